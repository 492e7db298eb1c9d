"""Steps of frameworks with other overlap: the same work, and waits where those frameworks wait."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))  # the benchmarks are programs, not an installed package

from published.overlap import blocking, chunked

from bagualu.comm.calls import Communication, Waited
from bagualu.parallel.pipeline.schedules.schedule import Action, Kind
from bagualu.parallel.simulation.events import Event, Operator, RankTrace, Role, Section

GEMM = Operator("product", (), (), 0, 0, 1)
SUM = Communication("reduce_scatter", "tensor", 4, 400)
GRADIENTS = Communication("reduce_scatter", "fold", 2, 1000)
SENT = Communication("send", "pipeline", 2, 10, 1)


@pytest.fixture
def role() -> Role:
    """Two backward passes with the same events, of which a sum and a reduction run beside a product, and the update."""
    passed: list[Event] = [SUM, GEMM, Waited("reduce_scatter", "tensor"), SENT, GRADIENTS, GEMM]
    sections = [Section("backward", Action(Kind.BACKWARD, index, 0), passed) for index in (0, 1)]
    end: list[Event] = [Waited("reduce_scatter", "fold"), Waited("reduce_scatter", "fold"), Waited("send", "pipeline", 1), GEMM]
    return Role(RankTrace(0, [*sections, Section("optimizer", None, end)], []), 1, 0, 2)


def listed(role: Role) -> list[list[Event]]:
    return [section.events for section in role.trace.sections]


def test_a_blocking_rank_waits_at_once_and_reduces_gradients_after_its_passes(role: Role) -> None:
    (made,) = blocking([role])
    passed = [SUM, Waited("reduce_scatter", "tensor"), GEMM, SENT, GEMM]
    reduced = [GRADIENTS, Waited("reduce_scatter", "fold")]
    assert listed(made) == [passed, passed, reduced * 2, [Waited("send", "pipeline", 1), GEMM]]
    assert listed(made)[0] is listed(made)[1]


def test_of_chunks_only_one_has_nothing_beside_it(role: Role) -> None:
    (made,) = chunked([role])
    assert [event.bytes for event in made.trace.calls()] == [100, 10, 1000] * 2
    assert listed(made)[0] is listed(made)[1]
    assert [event for event in listed(made)[0] if not isinstance(event, Communication)] == [
        event for event in listed(role)[0] if not isinstance(event, Communication)
    ]

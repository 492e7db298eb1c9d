"""Tells the virtual clock (comm/virtual_clock.py) what a rank computes in its steps, while it trains."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from bagualu.comm.group import Communicator
from bagualu.comm.virtual_clock import ClockedBackend, clocked
from bagualu.parallel.simulation.events import Operator
from bagualu.parallel.simulation.operator_cost import operator_seconds
from bagualu.trainer.simulation.operators import EachOperator


class StepClock:
    """The virtual time of a rank's steps. `seconds` returns what an operator takes on the rank's chip."""

    def __init__(self, backend: ClockedBackend, seconds: Callable[[Operator], float]) -> None:
        self._backend, self._seconds = backend, seconds
        self._mode = EachOperator(self._add)
        self._known: dict[int, float] = {}
        """The seconds of an operator, by its id. Equal operators are one object, which the mode keeps."""
        self.step_seconds = 0.0
        """What the latest step takes on the described cluster."""

    @contextmanager
    def timing(self) -> Iterator[None]:
        """Times a step within this context. Collective."""
        self._backend.begin_step()
        with self._mode:
            yield
        self.step_seconds = self._backend.end_step()

    def _add(self, operator: Operator, _: float) -> None:
        """Adds the operator to the rank's program."""
        if (seconds := self._known.get(id(operator))) is None:
            seconds = self._known[id(operator)] = self._seconds(operator)
        self._backend.computes(seconds)


def open_step_clock(communicator: Communicator) -> StepClock | None:
    """Returns the virtual time of this rank's steps; None unless the run was started with a described cluster."""
    backend = clocked(communicator)
    if backend is None:
        return None
    chip = backend.clock.cluster.part_of(communicator.rank).chip
    return StepClock(backend, lambda operator: operator_seconds(chip, operator))

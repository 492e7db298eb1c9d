"""Documents between ranks."""

import pytest

from bagualu.comm.group import Communicator
from bagualu.comm.objects import broadcast_json, collect_json, gather_json
from tests.harness import run


def exchange(communicator: Communicator) -> list[object]:
    own = {"rank": communicator.rank, "text": "ü" * communicator.rank, "none": None}
    group = communicator.world
    return [collect_json(own, group), gather_json(own, group), broadcast_json(own, group)]


@pytest.mark.parametrize(("backend", "size"), [("gloo", 3), *(("simulated", size) for size in range(1, 10))])
def test_every_document_arrives_in_its_place(backend: str, size: int) -> None:
    expected = [{"rank": rank, "text": "ü" * rank, "none": None} for rank in range(size)]
    for rank, (collected, gathered, told) in enumerate(run(backend, size, exchange)):
        assert collected == (expected if rank == 0 else None)
        assert gathered == expected
        assert told == expected[0]

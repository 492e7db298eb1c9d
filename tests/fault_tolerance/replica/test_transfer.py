"""Files between ranks: everything arrives as it was, in whatever chunks, and a rank that cannot write holds nobody up."""

import random
from pathlib import Path

import pytest

from bagualu.comm.group import Communicator
from bagualu.fault_tolerance.replica import transfer
from bagualu.fault_tolerance.replica.transfer import Transfer, deliver
from tests.harness import BACKENDS, run

SIZES = (0, 1, 1000, 1001, 4096, 10_000)


def exchange(communicator: Communicator, folder: Path, transfers: list[Transfer], chunk: int) -> str:
    transfer.CHUNK_BYTES = chunk
    outbox, inbox = (folder / f"{box}-{communicator.rank}" for box in ("out", "in"))
    try:
        deliver(transfers, outbox, inbox, communicator.world)
    except OSError as error:
        return str(error)
    return "delivered"


def prepare(folder: Path, size: int) -> list[Transfer]:
    chosen, found = random.Random(0), []
    for rank in range(size):
        for box in ("in", "out"):
            (folder / f"{box}-{rank}").mkdir()
        for number in range(6):
            name, count = f"file-{rank}-{number}", chosen.choice(SIZES)
            (folder / f"out-{rank}" / name).write_bytes(chosen.randbytes(count))
            others = [other for other in range(size) if other != rank]
            found += [Transfer(rank, other, name, count) for other in chosen.sample(others, 2 if number else 1)]
    return found


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("chunk", [1000, 2**24])
def test_everything_arrives(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, backend: str, chunk: int) -> None:
    monkeypatch.setattr(transfer, "CHUNK_BYTES", chunk)  # restored afterwards where ranks are threads
    transfers = prepare(tmp_path, 4)
    assert run(backend, 4, exchange, tmp_path, transfers, chunk) == ["delivered"] * 4
    for one in transfers:
        if one.bytes:
            arrived = tmp_path / f"in-{one.destination}" / one.name
            assert arrived.read_bytes() == (tmp_path / f"out-{one.source}" / one.name).read_bytes()


def test_nothing_to_deliver(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transfer, "CHUNK_BYTES", 1000)
    assert run("simulated", 2, exchange, tmp_path, [], 1000) == ["delivered"] * 2


def test_a_rank_that_cannot_write_holds_nobody_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transfer, "CHUNK_BYTES", 1000)
    transfers = prepare(tmp_path, 4)
    (tmp_path / "in-2").rmdir()
    answers = run("simulated", 4, exchange, tmp_path, transfers, 1000)
    assert [answer == "delivered" for answer in answers] == [True, True, False, True]

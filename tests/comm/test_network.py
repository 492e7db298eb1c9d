"""A network that misbehaves in the middle of a run: slow, dead in both directions or in one, broken off. Never a wrong sum."""

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

import tests.proxy  # noqa: F401  the workers, which import this module, need it
from bagualu.comm.errors import CommunicationError
from bagualu.comm.group import Communicator, Group, connect
from bagualu.comm.world import World
from tests.harness import run

RANKS, STEPS, TIMEOUT_SECONDS = 3, 40, 5.0


def train(communicator: Communicator, folder: str) -> tuple[str, int]:
    """Steps of every collective that a run needs, each checked. ("" or why it ended, steps done)."""
    communicator.close()
    rank, size = communicator.rank, communicator.size
    world = connect("gloo", World(rank, size, rank, f"proxied://{folder}"), TIMEOUT_SECONDS).world
    try:
        for step in range(STEPS):
            exchange(world, rank, size, step)
            (Path(folder) / f"step-{rank}").write_text(str(step))
    except CommunicationError as error:
        return str(error), step
    return "", STEPS


def exchange(world: Group, rank: int, size: int, step: int) -> None:
    values = torch.arange(3000, dtype=torch.float64).reshape(size, -1)
    total, mine, whole = values + rank + step, torch.empty(1000, dtype=torch.float64), torch.empty_like(values)
    expected = size * (values + step) + sum(range(size))
    world.all_reduce(total)
    assert torch.equal(total, expected), f"wrong sum in step {step}"
    world.reduce_scatter(mine, values + rank + step)
    assert torch.equal(mine, expected[rank]), f"wrong part in step {step}"
    world.all_gather(whole, mine)
    assert torch.equal(whole, expected), f"wrong whole in step {step}"


@contextmanager
def from_step_5_on(folder: Path, mode: str) -> Iterator[None]:
    """The network does `mode` once every rank has done step 5."""
    ended = threading.Event()

    def wait() -> None:
        steps = [folder / f"step-{rank}" for rank in range(RANKS)]
        while not ended.is_set() and not all(path.exists() and int(path.read_text() or 0) >= 5 for path in steps):
            time.sleep(0.01)
        (folder / "network").write_text(mode)

    thread = threading.Thread(target=wait)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


def test_a_slow_network_changes_nothing(tmp_path: Path) -> None:
    with from_step_5_on(tmp_path, "delay 0.01"):
        assert run("gloo", RANKS, train, str(tmp_path)) == [("", STEPS)] * RANKS


@pytest.mark.parametrize("mode", ["reset", "drop", "drop_in"])
def test_a_lost_network_is_a_named_failure_on_every_rank_and_no_wrong_sum(tmp_path: Path, mode: str) -> None:
    with from_step_5_on(tmp_path, mode):
        started = time.monotonic()
        results = run("gloo", RANKS, train, str(tmp_path))
    assert time.monotonic() - started < 100
    for why, step in results:
        assert "in group world of ranks [0, 1, 2] failed" in why
        assert 5 <= step < STEPS

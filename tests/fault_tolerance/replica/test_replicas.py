"""Losing processes, nodes and bytes: what the memory of the others still gives, and what it refuses to."""

import errno
import logging
import os
import shutil
import threading
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from bagualu.comm.errors import RecipeError
from bagualu.comm.group import Communicator
from bagualu.fault_tolerance.replica import node_folder, transfer
from tests.fault_tolerance.replica.cluster import keep, open_replicas, pieces, resume
from tests.harness import BACKENDS, run


def ranks(size: int, function: Callable[..., Any], *args: Any) -> list[Any]:
    return run("simulated", size, function, *args)


def held(folder: Path, node: int, step: int) -> list[str]:
    path = folder / f"node-{node}" / "replicas" / f"step-{step:08d}"
    return sorted(file.name.split(".")[0] for file in path.glob("*.safetensors"))


def lose_node(folder: Path, node: int) -> None:
    shutil.rmtree(folder / f"node-{node}")


def flip(path: Path, at: int) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("backend", BACKENDS)
def test_lost_processes(tmp_path: Path, backend: str) -> None:
    assert run(backend, 4, keep, tmp_path, 2, 10, 20) == [True] * 4
    assert held(tmp_path, 0, 20) == held(tmp_path, 1, 20) == [f"rank-{rank:05d}" for rank in range(4)]
    assert run(backend, 4, resume, tmp_path, 2) == [(20, [])] * 4


def test_each_node_holds_its_own_and_one_other_nodes_state(tmp_path: Path) -> None:
    ranks(6, keep, tmp_path, 2, 10)
    for node in range(3):
        mine = [2 * node, 2 * node + 1, (2 * node - 2) % 6, (2 * node - 1) % 6]
        assert held(tmp_path, node, 10) == sorted(f"rank-{rank:05d}" for rank in mine)
    before = [held(tmp_path, node, 10) for node in range(3)]
    assert ranks(6, resume, tmp_path, 2) == [(10, [])] * 6
    assert [held(tmp_path, node, 10) for node in range(3)] == before  # nobody was sent what he does not need


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("lost", [0, 1])
def test_a_lost_node_gets_its_state_from_its_partner(tmp_path: Path, backend: str, lost: int) -> None:
    run(backend, 4, keep, tmp_path, 2, 10, 20)
    lose_node(tmp_path, lost)
    assert run(backend, 4, resume, tmp_path, 2) == [(20, [])] * 4
    assert run(backend, 4, resume, tmp_path, 2) == [(20, [])] * 4  # and once more, with nothing kept in between


def test_nodes_that_are_not_partners_may_be_lost_together(tmp_path: Path) -> None:
    ranks(4, keep, tmp_path, 1, 10)
    lose_node(tmp_path, 0)
    lose_node(tmp_path, 2)
    assert ranks(4, resume, tmp_path, 1) == [(10, [])] * 4


def test_partners_that_are_lost_together_take_the_replica_with_them(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    ranks(4, keep, tmp_path, 1, 10, 20)
    lose_node(tmp_path, 1)
    lose_node(tmp_path, 2)
    assert ranks(4, resume, tmp_path, 1) == [(None, [])] * 4
    assert "the replica of step 20 is not used: no node holds the state of ranks [1]" in caplog.text
    assert not any(held(tmp_path, node, step) for node in range(4) for step in (10, 20))


@pytest.mark.parametrize(("size", "per_node"), [(2, 2), (2, 1), (3, 2), (6, 2), (1, 1)])
def test_another_number_of_ranks(tmp_path: Path, size: int, per_node: int) -> None:
    ranks(4, keep, tmp_path, 2, 10, 20)
    lose_node(tmp_path, 1)
    assert ranks(size, resume, tmp_path, per_node) == [(20, [])] * size


def test_two_generations_are_kept(tmp_path: Path) -> None:
    ranks(4, keep, tmp_path, 2, 10, 20, 30, 40)
    steps = sorted(path.name for path in (tmp_path / "node-1" / "replicas").iterdir() if not path.name.startswith("."))
    assert steps == ["step-00000030", "step-00000040"]


PLACES = [("rank-00001.safetensors", -1), ("rank-00001.safetensors", 3), ("rank-00001.json", 100), ("rank-00001.json", 3)]


@pytest.mark.parametrize(("name", "at"), PLACES)
def test_one_damaged_copy_is_not_used_and_is_replaced(tmp_path: Path, caplog: pytest.LogCaptureFixture, name: str, at: int) -> None:
    ranks(4, keep, tmp_path, 2, 10, 20)
    flip(tmp_path / "node-0" / "replicas" / "step-00000020" / name, at)
    assert ranks(4, resume, tmp_path, 2) == [(20, [])] * 4
    assert "this copy is not used" in caplog.text
    lose_node(tmp_path, 1)
    assert ranks(4, resume, tmp_path, 2) == [(20, [])] * 4  # node 0 has been given a good one


@pytest.mark.parametrize(("name", "at"), PLACES)
def test_when_both_copies_are_damaged_the_one_before_is_taken(tmp_path: Path, name: str, at: int) -> None:
    ranks(4, keep, tmp_path, 2, 10, 20)
    for node in (0, 1):
        flip(tmp_path / f"node-{node}" / "replicas" / "step-00000020" / name, at)
    answers = ranks(4, resume, tmp_path, 2)
    assert [step for step, _ in answers] == [10] * 4
    if name.endswith("safetensors") and at < 0:  # a quick look does not see it
        assert all("no undamaged copy of the state of ranks [1]" in complaints[0] for _, complaints in answers)
    assert not held(tmp_path, 0, 20)  # and never tried again
    assert ranks(4, resume, tmp_path, 2) == [(10, [])] * 4


@pytest.mark.parametrize("backend", BACKENDS)
def test_on_one_node_a_damaged_state_gives_the_one_before(tmp_path: Path, backend: str) -> None:
    run(backend, 4, keep, tmp_path, 4, 10, 20)
    flip(tmp_path / "node-0" / "replicas" / "step-00000020" / "rank-00003.safetensors", -1)
    assert [step for step, _ in run(backend, 4, resume, tmp_path, 4)] == [10] * 4


def test_another_runs_replicas_are_not_used_and_removed(tmp_path: Path) -> None:
    ranks(4, keep, tmp_path, 2, 10, 20)
    assert ranks(4, resume, tmp_path, 2, "another") == [(None, [])] * 4
    assert not held(tmp_path, 0, 20)


def test_a_node_that_missed_a_start_brings_nothing_of_its_own(tmp_path: Path) -> None:
    """Node 0 leaves with step 20; node 1 goes back to the beginning, alone, and comes as far as step 10."""
    ranks(2, keep, tmp_path, 1, 10, 20)
    shutil.move(tmp_path / "node-0", tmp_path / "away")
    shutil.rmtree(tmp_path / "node-1")
    ranks(2, keep, tmp_path, 1, 5)
    ranks(2, keep, tmp_path, 1, 10)
    shutil.rmtree(tmp_path / "node-0")
    shutil.move(tmp_path / "away", tmp_path / "node-0")
    assert ranks(2, resume, tmp_path, 1) == [(10, [])] * 2


def test_the_same_step_of_another_way_is_not_mixed_in(tmp_path: Path) -> None:
    """Both nodes hold step 20, node 0 that of an earlier start."""
    ranks(2, keep, tmp_path, 1, 20)
    shutil.move(tmp_path / "node-0", tmp_path / "away")
    ranks(2, partial(keep, way=1), tmp_path, 1, 20)
    shutil.rmtree(tmp_path / "node-0")
    shutil.move(tmp_path / "away", tmp_path / "node-0")
    assert ranks(2, resume, tmp_path, 1) == [(20, [])] * 2


def test_parts_of_different_starts_do_not_make_a_replica(tmp_path: Path) -> None:
    """The same step of two starts: half of it from one, half from the other."""
    for start in ("one", "two"):
        ranks(4, keep, tmp_path / start, 4, 20)
    there = tmp_path / "one" / "node-0" / "replicas" / "step-00000020"
    for rank in (2, 3):
        for ending in ("json", "safetensors"):
            name = f"rank-{rank:05d}.{ending}"
            shutil.copy(tmp_path / "two" / "node-0" / "replicas" / "step-00000020" / name, there / name)
    assert ranks(4, resume, tmp_path / "one", 4) == [(None, [])] * 4


def fail_on(rank: int, call: str) -> Callable[..., Any]:
    original = getattr(os, call)

    def fail(*args: Any, **kwargs: Any) -> Any:
        if threading.current_thread().name == f"rank-{rank}":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return original(*args, **kwargs)

    return fail


def keep_once_full(communicator: Communicator, folder: Path, patch: Callable[[], None]) -> bool:
    replicas = open_replicas(communicator, folder, 2)
    replicas.start(None)
    for step in (10, 20, 30):
        communicator.world.barrier()
        if step == 20 and communicator.rank == 0:
            patch()
        communicator.world.barrier()
        replicas.keep(step, pieces(step, communicator.rank, communicator.size), {"step": step})
    return replicas.off


@pytest.mark.parametrize("call", ["write", "pwrite", "rename"])
def test_full_memory_ends_replicas_but_not_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, call: str
) -> None:
    with monkeypatch.context() as patch:
        assert ranks(4, keep_once_full, tmp_path, lambda: patch.setattr(os, call, fail_on(2, call))) == [True] * 4
    said = [record for record in caplog.records if record.levelno >= logging.WARNING]
    assert len(said) == 1
    assert "step 20: no replica: rank 2: OSError: [Errno 28] No space left on device; no more will be made" in caplog.text
    assert not list(tmp_path.glob("node-*/replicas/.saving-*"))
    assert ranks(4, resume, tmp_path, 2)[0][0] in ((10,) if call != "rename" else (10, 20))


def refusal(communicator: Communicator, folder: Path) -> str:
    replicas = open_replicas(communicator, folder, 2)
    with pytest.raises(RecipeError) as error:
        replicas.check_room(10**9)
    return str(error.value)


def test_too_little_memory_is_refused_with_both_sizes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(node_folder.Site, "free_bytes", lambda self: 10**10 if self.nodes.of[self.group.rank] == 0 else 8 * 10**9)
    answers = ranks(4, refusal, tmp_path)
    assert len(set(answers)) == 1
    assert "needs 8.4 GB of memory" in answers[0]
    assert "on node 1 (rank 2)" in answers[0]
    assert "has 8 GB; give it more (a bigger /dev/shm, more nodes) or checkpoint.replica_every=0" in answers[0]


def end(communicator: Communicator, folder: Path) -> None:
    open_replicas(communicator, folder, 2).remove()


def test_a_run_that_ends_leaves_nothing(tmp_path: Path) -> None:
    ranks(4, keep, tmp_path, 2, 10)
    ranks(4, end, tmp_path)
    assert [list(path.iterdir()) for path in sorted(tmp_path.glob("node-*"))] == [[], []]


def go_back(communicator: Communicator, folder: Path) -> None:
    open_replicas(communicator, folder, 2).forget_after(10)


def test_a_run_that_goes_back_leaves_its_later_replicas_behind(tmp_path: Path) -> None:
    ranks(4, keep, tmp_path, 2, 10, 20)
    ranks(4, go_back, tmp_path)
    assert ranks(4, resume, tmp_path, 2) == [(10, [])] * 4


def damaged_on_the_way(original: Callable[..., None]) -> Callable[..., None]:
    """What arrives on rank 2 has one bit less or more."""

    def write(path: Path, at: int, data: memoryview) -> None:
        if threading.current_thread().name == "rank-2" and path.suffix == ".safetensors":
            data = memoryview(bytes(data[:-1]) + bytes([data[-1] ^ 1]))
        original(path, at, data)

    return write


def test_what_is_damaged_on_its_way_is_not_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(transfer, "_write", damaged_on_the_way(transfer._write))
        assert ranks(4, keep, tmp_path, 2, 10) == [False] * 4
    assert "step 10: no replica: rank 2: " in caplog.text
    assert "does not match its hash" in caplog.text
    assert ranks(4, resume, tmp_path, 2) == [(None, [])] * 4


def test_what_is_damaged_on_its_way_back_is_not_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ranks(4, keep, tmp_path, 2, 10)
    lose_node(tmp_path, 1)
    with monkeypatch.context() as patch:
        patch.setattr(transfer, "_write", damaged_on_the_way(transfer._write))
        for step, complaints in ranks(4, resume, tmp_path, 2):
            assert step is None
            assert "rank 2: " in complaints[0]
            assert "does not match its hash" in complaints[0]

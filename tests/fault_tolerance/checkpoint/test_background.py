"""A save in the background: training goes on, the checkpoint is of the moment it was begun, failures are known a step later."""

import errno
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from checks import content_problems
from ranks import rows_of, run, save_while_training, steps_until_known

from bagualu.comm.group import Group
from bagualu.fault_tolerance.checkpoint.layout.directory import latest
from bagualu.fault_tolerance.checkpoint.layout.format import CheckpointError, step_name
from bagualu.fault_tolerance.checkpoint.saving import save
from bagualu.fault_tolerance.checkpoint.saving.commit import Claim
from bagualu.fault_tolerance.checkpoint.saving.fence import EPOCH, Fence
from bagualu.fault_tolerance.checkpoint.saving.save import Saver
from bagualu.fault_tolerance.checkpoint.saving.snapshot import Snapshot
from bagualu.parallel.boxes import TensorPiece

ALONE = Group("world", (0,), 0, None)


def with_savers(root: Any, size: int, function: Any, timeout_seconds: float = 60.0) -> list[Any]:
    """function(saver) on `size` ranks, each with its saver of the same fence."""
    fence = Fence.take(root)

    def one(group: Group) -> Any:
        saver = Saver(fence, group, keep=2, timeout_seconds=timeout_seconds)
        try:
            return function(saver)
        finally:
            saver.close(wait=timeout_seconds == 60.0)

    return run(size, one)


def test_what_is_saved_is_what_was_there_when_the_save_began(tmp_path):
    def train(saver: Saver) -> list[Any]:
        snapshot = Snapshot()
        return [save_while_training(saver, step, snapshot)[0] for step in (10, 20, 30)]

    assert with_savers(tmp_path, 4, train) == [[tmp_path / step_name(step) for step in (10, 20, 30)]] * 4
    assert [content_problems(tmp_path / step_name(step)) for step in (20, 30)] == [[], []]
    assert not (tmp_path / step_name(10)).exists()


def test_a_snapshot_keeps_its_buffer_and_copies_any_strides(tmp_path):
    base = torch.arange(24.0).view(4, 6)
    pieces = [
        TensorPiece("a", (6, 4), (0, 0), base.t()),
        TensorPiece("b", (3,), (0,), torch.ones(3, dtype=torch.bool)),
        TensorPiece("c", (0, 2), (0, 0), torch.empty(0, 2)),
        TensorPiece("d", (), (), torch.tensor(1.5, dtype=torch.float64)),
    ]
    snapshot = Snapshot()
    first = snapshot.take(pieces)
    assert all(torch.equal(copy.tensor, piece.tensor) for copy, piece in zip(first, pieces, strict=True))
    base.zero_()
    assert first[0].tensor.sum() > 0
    second = snapshot.take(pieces)
    assert [piece.tensor.data_ptr() for piece in second] == [piece.tensor.data_ptr() for piece in first]


def failing_once(patch: pytest.MonkeyPatch, call: str, rank: int, error: BaseException) -> None:
    """The next os.<call> of that rank's writer on a shard raises."""
    original, armed = getattr(os, call), [True]

    def fail(*args: Any, **kwargs: Any) -> Any:
        if threading.current_thread().name == f"checkpoint-writer-{rank}" and armed and not isinstance(args[0], str):
            armed.clear()
            raise error
        return original(*args, **kwargs)

    patch.setattr(os, call, fail)


@pytest.mark.parametrize("call", ["open", "write", "fsync"])
@pytest.mark.parametrize("error", [OSError(errno.EIO, "Input/output error"), OSError(errno.EDQUOT, "Quota"), SystemExit(1)])
@pytest.mark.parametrize("rank", [0, 3])
def test_whatever_ends_one_writer_is_known_on_every_rank_one_step_later_and_training_goes_on(
    tmp_path, monkeypatch, left, call, error, rank
):
    """Test 5 and 23 of the reference. A writer is a thread: it ends by an exception or with its whole process."""
    begun = threading.Barrier(4)

    def train(saver: Saver) -> list[Any]:
        snapshot = Snapshot()
        saved = [save_while_training(saver, 10, snapshot)[0]]
        saver.rest()  # it reads again what it has written
        if begun.wait() == 0:
            failing_once(monkeypatch, call, rank, error)
        begun.wait()
        saver.start(20, snapshot.take(rows_of(20, saver.group)), {"step": 20})
        saver._under_way.job.wait(60)  # the step is longer than the failing writer takes
        saved.append(steps_until_known(saver))
        return [*saved, save_while_training(saver, 30, snapshot)[0]]

    for first, (failed, steps), later in with_savers(tmp_path, 4, train):
        assert (first, later) == (tmp_path / step_name(10), tmp_path / step_name(30))
        assert isinstance(failed, CheckpointError)
        assert str(failed).startswith(f"step 20 was not saved: rank {rank}: {type(error).__name__}:")
        assert steps == 1
    assert left(tmp_path) == [step_name(10), step_name(30)]
    assert content_problems(latest(tmp_path)) == []


def test_a_failure_is_not_held_up_by_writers_that_are_still_busy(tmp_path, monkeypatch, left):
    """Rank 1 fails while rank 2 still writes: all know at once, and the next save waits its turn."""
    release, original = threading.Event(), os.fsync
    writing, most, counting = [0], [0], threading.Lock()

    def slow(descriptor: int) -> None:
        if threading.current_thread().name == "checkpoint-writer-2":
            with counting:
                writing[0] += 1
                most[0] = max(most[0], writing[0])
            release.wait(60)
            with counting:
                writing[0] -= 1
        original(descriptor)

    def train(saver: Saver) -> Any:
        if saver.group.rank == 1:
            failing_once(monkeypatch, "write", 1, OSError(errno.EIO, "Input/output error"))
        saver.group.barrier()
        failed, _ = save_while_training(saver, 20, Snapshot())
        early = not release.is_set()
        saver.group.barrier()
        release.set()
        return failed, early, save_while_training(saver, 30, Snapshot())[0]

    monkeypatch.setattr(os, "fsync", slow)
    for failed, early, later in with_savers(tmp_path, 3, train):
        assert "rank 1: OSError: [Errno 5]" in str(failed)
        assert early
        assert later == tmp_path / step_name(30)
    assert most == [1]
    assert left(tmp_path) == [step_name(30)]


def test_storage_that_does_not_answer_fails_the_save_and_not_the_run(tmp_path, monkeypatch, left):
    """Test 24: a FIFO that nobody feeds stands for storage that hangs."""
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    root, original, hangs = tmp_path / "root", os.fsync, [True]

    def hang(descriptor: int) -> None:
        if threading.current_thread().name == "checkpoint-writer-1" and hangs:
            fifo.read_bytes()
        original(descriptor)

    def train(saver: Saver) -> Any:
        failed, steps = save_while_training(saver, 20, Snapshot())
        second, _ = save_while_training(saver, 30, Snapshot())  # the writer is still stuck
        saver.group.barrier()
        if saver.group.rank == 1:
            hangs.clear()
            fifo.write_bytes(b"")
        return failed, steps, second, save_while_training(saver, 40, Snapshot())[0]

    monkeypatch.setattr(os, "fsync", hang)
    for failed, steps, second, later in with_savers(root, 2, train, timeout_seconds=1.0):
        assert "step 20 was not saved: rank 1: the storage has not answered" in str(failed)
        assert steps > 10  # training went on meanwhile
        assert "step 30 was not saved: rank 1: the storage has not answered" in str(second)
        assert later == root / step_name(40)
    assert latest(root) == root / step_name(40)


def opened(descriptor: int) -> str:
    return os.readlink(f"/proc/self/fd/{descriptor}")


def hanging_once(patch: pytest.MonkeyPatch, call: str, here: Callable[..., bool], release: threading.Event) -> None:
    """The first os.<call> whose arguments are `here` waits for `release`, and is then done as it should be."""
    original, armed = getattr(os, call), [True]

    def hang(*args: Any) -> Any:
        if armed and here(*args):
            armed.clear()
            release.wait(60)
        return original(*args)

    patch.setattr(os, call, hang)


@pytest.mark.parametrize(
    ("call", "here"),
    [
        ("fsync", lambda descriptor: opened(descriptor).endswith("manifest.json")),
        ("rename", lambda source, destination: str(destination).endswith(step_name(20))),
        ("fsync", lambda descriptor: (Path(opened(descriptor)) / step_name(20)).exists()),
    ],
    ids=["manifest", "rename", "directory"],
)
def test_a_commit_that_hangs_is_given_up_stalls_no_step_and_is_none_when_the_storage_answers(tmp_path, monkeypatch, call, here):
    release = threading.Event()

    def train(saver: Saver) -> tuple[Any, int, bool, Any]:
        hung = save_while_training(saver, 20, Snapshot())
        saver.group.barrier()
        release.set()
        saver.rest()
        saver.group.barrier()
        return *hung, (tmp_path / step_name(20)).exists(), save_while_training(saver, 20, Snapshot())[0]

    hanging_once(monkeypatch, call, here, release)
    for failed, steps, late, again in with_savers(tmp_path, 2, train, timeout_seconds=1.0):
        assert "step 20 was not saved: rank 0: the storage has not answered" in str(failed)
        assert steps > 10
        assert not late
        assert again == tmp_path / step_name(20)
    assert content_problems(tmp_path / step_name(20)) == []


def test_of_a_commit_and_whoever_gives_it_up_one_has_the_last_word():
    for first, second in ((Claim.commit, Claim.give_up), (Claim.give_up, Claim.commit)):
        claim = Claim()
        assert first(claim)
        assert not second(claim)
        assert first(claim)
        assert claim.given_up == (first is Claim.give_up)


def test_a_commit_that_is_not_durable_and_cannot_be_taken_back_says_both(tmp_path, monkeypatch):
    """The sync of the directory after the rename fails, and so does the rename that would take it back."""
    original_sync, original_rename, final = os.fsync, os.rename, tmp_path / step_name(20)

    def sync(descriptor: int) -> None:
        if Path(opened(descriptor)) == tmp_path and final.exists():
            raise OSError(errno.EIO, "Input/output error")
        original_sync(descriptor)

    def rename(source: Any, destination: Any) -> None:
        if Path(source) == final:
            raise OSError(errno.EROFS, "Read-only file system")
        original_rename(source, destination)

    saver = Saver(Fence.take(tmp_path), ALONE, keep=2)
    monkeypatch.setattr(os, "fsync", sync)
    saver.start(20, rows_of(20, ALONE), {})
    with pytest.raises(CheckpointError, match="Input/output error"):
        saver.conclude()
    assert not final.exists()
    monkeypatch.setattr(os, "rename", rename)
    saver.start(20, rows_of(20, ALONE), {})
    with pytest.raises(CheckpointError, match=r"Input/output error.*step-00000020 exists nevertheless.*Read-only.*: remove it"):
        saver.conclude()
    saver.close()


def test_one_save_at_a_time(tmp_path):
    saver = Saver(Fence.take(tmp_path), ALONE, keep=2)
    saver.start(1, rows_of(1, ALONE), {})
    with pytest.raises(ValueError, match="step 1 is still being saved"):
        saver.start(2, rows_of(2, ALONE), {})
    saver.conclude()
    saver.close()


def test_a_rank_that_finds_the_storage_gone_after_the_others_leaves_nothing_there(tmp_path, monkeypatch):
    """The other's part has failed, and rank 0 has removed what there was, before this rank's writer begins."""
    removed = threading.Event()
    remove, write = save._remove_quietly, Saver._write_part

    def removing(temporary: Path) -> None:
        remove(temporary)
        removed.set()

    def write_part(saver: Saver, *args: Any) -> dict[str, Any]:
        if saver.group.rank == 1:
            assert removed.wait(30)
        return write(saver, *args)

    def train(saver: Saver) -> None:
        if saver.group.rank == 0:
            (tmp_path / EPOCH).unlink()
        saver.start(10, rows_of(10, saver.group), {})
        while not saver.status()[1] and saver.group.rank == 0:
            time.sleep(0.001)
        with pytest.raises(CheckpointError, match="still mounted"):
            saver.advance(wait=False)

    monkeypatch.setattr(save, "_remove_quietly", removing)
    monkeypatch.setattr(Saver, "_write_part", write_part)
    with_savers(tmp_path, 2, train)
    assert os.listdir(tmp_path) == []

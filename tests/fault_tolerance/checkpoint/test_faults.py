"""Kills, failed writes and damage: the old checkpoint or the new one, whole; never a mixture, never silence."""

import errno
import itertools
import json
import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch

from bagualu.fault_tolerance.checkpoint.layout.directory import latest, list_checkpoints
from bagualu.fault_tolerance.checkpoint.layout.format import CheckpointError, CheckpointStorageError
from bagualu.fault_tolerance.checkpoint.reading.inspect import describe, verify
from bagualu.fault_tolerance.checkpoint.reading.load import Checkpoint
from bagualu.fault_tolerance.checkpoint.saving.fence import Fence
from bagualu.fault_tolerance.checkpoint.saving.save import save

HERE = Path(__file__).parent


def read_all(path, expected):
    """Raises CheckpointError, or gives what was saved."""
    checkpoint = Checkpoint(path)
    for name, tensor in expected.items():
        out = torch.full_like(tensor, -1)
        checkpoint.read(name, (0,) * out.dim(), out)
        assert torch.equal(out, tensor)


def test_killed_at_every_call_of_a_save(tmp_path):
    done = subprocess.run([sys.executable, str(HERE / "killed_save.py"), str(tmp_path / "root")], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    rows = json.loads(done.stdout)
    assert all(row["intact"] and row["saved"] and row["left"] == ["step-00000030"] for row in rows)
    steps = [row["step"] for row in rows]
    assert steps == sorted(steps)  # old up to the commit, new from there on
    assert set(steps) == {10, 20}
    assert [row["code"] for row in rows] == [9] * (len(rows) - 1) + [0]
    assert len(rows) > 30  # the enumeration did reach the calls


def failing(call, on_rank, when=lambda *args: True):
    """`os.<call>` that has no space left on the thread of one rank; of all for mkdir, since one is enough."""
    original, name = getattr(os, call), "checkpoint-writer-" + ("" if call == "mkdir" else str(on_rank))

    def fail(*args, **kwargs):
        if threading.current_thread().name.startswith(name) and when(*args):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return original(*args, **kwargs)

    return fail


@pytest.mark.parametrize(
    ("call", "rank"), [("write", 2), ("fsync", 3), ("open", 1), ("write", 0), ("rename", 0), ("mkdir", 0), ("fsync", 0)]
)
def test_a_failure_on_one_rank_is_raised_on_all_and_leaves_the_old(
    tmp_path, monkeypatch, save_step, save_with, model, left, call, rank
):
    old = save_step(tmp_path, 10, 4)[0]
    fence = Fence.take(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(os, call, failing(call, rank))
        errors = save_with(fence, 20, 4)
    assert {type(error) for error in errors} == {CheckpointStorageError}
    assert len({str(error) for error in errors}) == 1
    more = " (and 3 more ranks)" if call == "mkdir" else ""
    assert f"step 20 was not saved: rank {rank}{more}: OSError: [Errno 28] No space left on device" in str(errors[0])
    assert left(tmp_path) == ["step-00000010"]
    read_all(old, model(10))
    assert save_with(fence, 20, 4) == [tmp_path / "step-00000020"] * 4  # and goes on once there is space


def test_a_failed_fsync_after_the_rename_takes_the_step_back(tmp_path, monkeypatch, save_step, save_with, left):
    save_step(tmp_path, 10, 2)
    fence = Fence.take(tmp_path)
    root = os.stat(tmp_path).st_ino
    armed = itertools.count()
    monkeypatch.setattr(os, "fsync", failing("fsync", 0, lambda fd: os.fstat(fd).st_ino == root and next(armed) == 0))
    assert all("step 20 was not saved" in str(error) for error in save_with(fence, 20, 2))
    assert left(tmp_path) == ["step-00000010"]


def test_an_error_while_the_pieces_are_made_is_raised_on_all(tmp_path, run_ranks, pieces, left):
    def broken(group):
        yield from pieces(20, group)
        if group.rank == 2:
            raise RuntimeError("out of memory\nin two lines")

    errors = run_ranks(4, lambda group: save(tmp_path, 20, broken(group), {}, group, 1))
    assert all("rank 2: RuntimeError: out of memory in two lines;" in str(error) for error in errors)
    assert left(tmp_path) == []


def test_several_failed_ranks_are_counted(tmp_path, run_ranks):
    def broken(group):
        raise OSError("no such storage")
        yield

    errors = run_ranks(4, lambda group: save(tmp_path, 20, broken(group), {}, group, 1))
    assert all("rank 0 (and 3 more ranks)" in str(error) for error in errors)


def test_a_root_that_is_a_file_is_an_error_on_all(tmp_path, save_step):
    (tmp_path / "file").write_text("")
    errors = save_step(tmp_path / "file", 1, 2)
    assert all(isinstance(error, CheckpointError) and "Error" in str(error) for error in errors)


def test_everything_is_durable_before_the_rename_and_the_rename_after_it(tmp_path, monkeypatch, save_with):
    log = []

    def spy(call, tell):
        original = getattr(os, call)
        monkeypatch.setattr(os, call, lambda *args: (log.append(tell(*args)), original(*args))[1])

    name = lambda fd: os.path.basename(os.readlink(f"/proc/self/fd/{fd}")).split("-")[0]  # noqa: E731
    (tmp_path / "root").mkdir()
    fence = Fence.take(tmp_path / "root")
    spy("write", lambda fd, data: f"write {name(fd)}")
    spy("fsync", lambda fd: f"fsync {name(fd)}")
    spy("rename", lambda a, b: "rename")
    save_with(fence, 10)
    calls = [call for call, _ in itertools.groupby(log)]
    assert calls == ["write rank", "fsync rank", "fsync .saving", "write manifest.json", "fsync manifest.json",
                     "fsync .saving", "rename", "fsync root"]  # fmt: skip


def test_every_flipped_byte_is_found(tmp_path, model, save_step):
    path = save_step(tmp_path, 10, 2)[0]
    for file in sorted(path.iterdir()):
        good = file.read_bytes()
        for at in range(len(good)):
            file.write_bytes(good[:at] + bytes([good[at] ^ (1 << at % 8)]) + good[at + 1 :])
            assert verify(path), (file.name, at)
            with pytest.raises(CheckpointError):
                read_all(path, model(10))
        file.write_bytes(good)
    assert verify(path) == []


def test_truncated_longer_deleted_and_swapped_files_are_found(tmp_path, model, save_step):
    path = save_step(tmp_path, 10, 2)[0]
    other = save_step(tmp_path, 20, 2)[0]
    for file in sorted(path.iterdir()):
        good = file.read_bytes()
        swapped = [(path / name).read_bytes() for name in ("rank-00000.safetensors", "rank-00001.safetensors")]
        versions = [good[:n] for n in (0, 1, len(good) // 2, len(good) - 1)]
        versions += [good + b"\0", (other / file.name).read_bytes(), None]
        versions += [raw for raw in swapped if raw != good]
        for version in versions:
            file.unlink()
            if version is not None:
                file.write_bytes(version)
            assert verify(path)
            assert all(str(path) in problem and "\n" not in problem for problem in verify(path))
            with pytest.raises(CheckpointError, match=str(path)):
                read_all(path, model(10))
            file.write_bytes(good)
    assert verify(path) == []


def test_a_copy_under_another_step_is_refused(tmp_path, save_step):
    path = save_step(tmp_path, 10)[0]
    shutil.copytree(path, tmp_path / "step-00000011")
    with pytest.raises(CheckpointError, match="is that of step 10"):
        Checkpoint(latest(tmp_path))


def test_damage_is_described_without_hiding_the_others(tmp_path, save_step):
    for step in (10, 20, 30):
        save_step(tmp_path, step, 2, keep=3)
    (tmp_path / "step-00000020" / "manifest.json").unlink()
    (tmp_path / "step-00000030" / "rank-00001.safetensors").write_bytes(b"")
    rows = [describe(path) for path in list_checkpoints(tmp_path)]
    assert [row["step"] for row in rows] == [10, 20, 30]
    assert (rows[0]["layout"], rows[0]["tensors"], rows[0]["problem"]) == ("data 2", 4, None)
    assert rows[0]["bytes"] == sum(path.stat().st_size for path in (tmp_path / "step-00000010").glob("rank-*"))
    assert "manifest.json cannot be read" in rows[1]["problem"]
    assert "rank-00001.safetensors has 0 bytes instead of" in rows[2]["problem"]
    json.dumps(rows)
    assert len(list_checkpoints(tmp_path)) == 3

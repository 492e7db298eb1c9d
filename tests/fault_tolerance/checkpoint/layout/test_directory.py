"""Which checkpoints there are, which stay, and what is never taken for one."""

import subprocess
import sys
from pathlib import Path

import pytest

from bagualu.fault_tolerance.checkpoint.layout.directory import delete, discard, latest, list_checkpoints
from bagualu.fault_tolerance.checkpoint.layout.format import CheckpointError, step_name
from bagualu.fault_tolerance.checkpoint.reading.inspect import verify
from bagualu.fault_tolerance.checkpoint.saving.commit import commit
from bagualu.fault_tolerance.checkpoint.saving.save import Saver, take_fence


def test_the_newest_stay(tmp_path, save_step, left):
    for step in (1, 2, 3, 4):
        save_step(tmp_path, step, 2, keep=2)
    assert left(tmp_path) == ["step-00000003", "step-00000004"]
    assert latest(tmp_path) == tmp_path / "step-00000004"


def test_a_damaged_one_does_not_count_and_the_one_just_saved_stays(tmp_path, save_step, left):
    for step in (1, 2, 3):
        save_step(tmp_path, step, keep=3)
    (tmp_path / "step-00000003" / "manifest.json").write_bytes(b"{}")
    save_step(tmp_path, 4, keep=2)
    assert left(tmp_path) == [step_name(2), step_name(3), step_name(4)]
    save_step(tmp_path, 1, keep=1)  # gone back to an earlier step
    assert left(tmp_path) == [step_name(1), step_name(4)]


def test_the_last_whole_one_stays_when_newer_ones_rot_in_silence(tmp_path, run_ranks, pieces, left, monkeypatch, caplog):
    """A flipped byte that no quick look sees is found by the rank that wrote it, before what is older goes."""

    def rotting(fence, temporary, final, manifest, claim):
        commit(fence, temporary, final, manifest, claim)
        if manifest.step in (3, 4):
            shard = final / "rank-00001.safetensors"
            shard.write_bytes(shard.read_bytes()[:-1] + bytes([shard.read_bytes()[-1] ^ 1]))

    monkeypatch.setattr("bagualu.fault_tolerance.checkpoint.saving.save.commit", rotting)
    stays = {}

    def train(group):
        saver = Saver(take_fence(tmp_path, group), group, keep=2)
        for step in range(1, 7):
            saver.start(step, pieces(step, group), {"step": step})
            saver.conclude()
            saver.status()  # training goes on
            saver.rest()
            group.barrier()
            stays[step] = [int(name[-1]) for name in left(tmp_path)]
            group.barrier()
        saver.close()

    assert run_ranks(2, train) == [None, None]
    assert stays == {1: [1], 2: [1, 2], 3: [2, 3], 4: [2, 3, 4], 5: [2, 3, 4, 5], 6: [5, 6]}
    assert caplog.text.count("does not count towards checkpoint.keep=2") == 2
    assert all(f"rank 1: {tmp_path / step_name(step)}: " in caplog.text for step in (3, 4))


def test_whatever_else_lies_there_is_ignored(tmp_path, save_step, left):
    assert latest(tmp_path / "absent") is None
    (tmp_path / "latest").write_text("step-99999999")
    (tmp_path / "step-00000099").write_text("a file")
    (tmp_path / "step-00000098").symlink_to("step-00000098")
    (tmp_path / "step-7").mkdir()
    (tmp_path / "step-000000007").mkdir()
    (tmp_path / ".saving-step-00000050-abcd").mkdir()
    assert list_checkpoints(tmp_path) == []
    save_step(tmp_path, 10)
    assert list_checkpoints(tmp_path) == [tmp_path / "step-00000010"]


def test_steps_beyond_eight_digits_sort_by_number(tmp_path, save_step, left):
    save_step(tmp_path, 123_456_789)
    save_step(tmp_path, 99_999_999)
    assert [path.name for path in list_checkpoints(tmp_path)] == ["step-99999999", "step-123456789"]


def test_what_dead_saves_left_is_removed_by_the_next(tmp_path, save_step, left):
    for name in (".saving-step-00000001-aa", ".removing-step-00000002-bb"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "rank-00000.safetensors").write_bytes(b"half")
    (tmp_path / "notes.txt").write_text("mine")
    save_step(tmp_path, 3, 2)
    assert left(tmp_path) == ["notes.txt", "step-00000003"]


def test_a_committed_step_is_never_overwritten(tmp_path, save_step, left):
    path = save_step(tmp_path, 3, 2)[0]
    before = {file.name: file.read_bytes() for file in path.iterdir()}
    for error in save_step(tmp_path, 3, 2):
        assert isinstance(error, CheckpointError)
        assert "is there already and never overwritten" in str(error)
    assert {file.name: file.read_bytes() for file in path.iterdir()} == before
    discard(path)
    assert left(tmp_path) == []
    assert save_step(tmp_path, 3, 2) == [path] * 2


def test_discarding_what_is_not_there_says_so(tmp_path):
    with pytest.raises(CheckpointError, match="step-00000003 cannot be removed"):
        discard(tmp_path / "step-00000003")
    assert "manifest.json cannot be read" in verify(tmp_path / "step-00000003")[0]


def test_what_cannot_be_deleted_stays_for_the_next_call(tmp_path, monkeypatch):
    file = tmp_path / "file"
    file.touch()

    def refuse(path, **_):
        raise PermissionError(1, "Operation not permitted", str(path))

    monkeypatch.setattr(Path, "unlink", refuse)
    delete(file)
    assert file.exists()
    with pytest.raises(PermissionError):
        delete(file, ignore_errors=False)


def test_listing_and_verifying_need_no_torch():
    program = (
        "import sys, bagualu.fault_tolerance.checkpoint.reading.inspect, bagualu.fault_tolerance.checkpoint.saving.retention\n"
    )
    subprocess.run([sys.executable, "-c", program + "assert 'torch' not in sys.modules"], check=True)

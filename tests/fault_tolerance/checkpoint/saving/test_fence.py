"""The newest start of a run owns its checkpoints; nothing that lies in the directory gets in the way."""

import os
from pathlib import Path

import pytest
from ranks import save_fenced

from bagualu.fault_tolerance.checkpoint.layout.directory import list_checkpoints
from bagualu.fault_tolerance.checkpoint.layout.format import CheckpointError
from bagualu.fault_tolerance.checkpoint.saving import fence as module
from bagualu.fault_tolerance.checkpoint.saving.fence import EPOCH, Fence


def test_every_start_counts_one_up_and_ends_the_right_of_those_before(tmp_path):
    root = tmp_path / "deep" / "root"
    fences = [Fence.take(root) for _ in range(3)]
    assert [fence.epoch for fence in fences] == [1, 2, 3]
    fences[2].check()
    for number, fence in enumerate(fences[:2], 1):
        with pytest.raises(CheckpointError, match=rf"later start of this run \(number 3, this one is {number}\); end this process"):
            fence.check()
    for error in save_fenced(fences[0], 10, 2):
        assert "step 10 was not saved: rank 0 (and 1 more ranks): " in str(error)
    assert save_fenced(fences[2], 10, 2) == [root / "step-00000010"] * 2


def test_of_two_starts_that_read_the_same_number_one_is_left(tmp_path, monkeypatch):
    """The other one takes the fence between the look at the number and the rename."""
    first: list[Fence] = []
    read = module._epoch

    def epoch(root: Path) -> int:
        number = read(root)
        if not first:
            monkeypatch.setattr(module, "_epoch", read)
            first.append(Fence.take(root))
        return number

    monkeypatch.setattr(module, "_epoch", epoch)
    second = Fence.take(tmp_path)
    assert first[0].epoch == second.epoch == 1
    second.check()
    with pytest.raises(CheckpointError, match="later start"):
        first[0].check()


@pytest.mark.parametrize("content", [b"", b"seven\n", b"\xff\xfe", b"4"])
def test_an_epoch_that_nobody_wrote_is_no_obstacle(tmp_path, content):
    (tmp_path / EPOCH).write_bytes(content)
    fence = Fence.take(tmp_path)
    fence.check()
    (tmp_path / EPOCH).write_bytes(content)
    with pytest.raises(CheckpointError, match="later start"):
        fence.check()
    (tmp_path / EPOCH).unlink()
    with pytest.raises(CheckpointError, match="still mounted"):
        fence.check()


def test_leftovers_links_that_go_in_circles_and_strangers(tmp_path, left):
    """Test 25: what dead saves left is cleared, everything else is left alone, and nothing of it is ever a checkpoint."""
    (tmp_path / ".saving-step-00000005-dead-1").mkdir()
    (tmp_path / ".saving-step-00000005-dead-1" / "rank-00000.safetensors").write_bytes(b"half")
    (tmp_path / ".saving-epoch-dead").write_text("1 dead\n")
    (tmp_path / ".saving-loop").symlink_to(".saving-loop")
    (tmp_path / ".removing-loop").symlink_to(tmp_path)
    (tmp_path / "step-00000098").symlink_to("step-00000098")
    (tmp_path / "latest").write_text("step-99999999")
    os.mkfifo(tmp_path / "fifo")
    fence = Fence.take(tmp_path)
    assert list_checkpoints(tmp_path) == []
    assert left(tmp_path) == ["fifo", "latest", "step-00000098"]
    assert save_fenced(fence, 10, keep=1) == [tmp_path / "step-00000010"]
    assert save_fenced(fence, 20, keep=1) == [tmp_path / "step-00000020"]
    assert list_checkpoints(tmp_path) == [tmp_path / "step-00000020"]
    assert left(tmp_path) == ["fifo", "latest", "step-00000020", "step-00000098"]

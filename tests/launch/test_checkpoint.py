"""`bagualu checkpoint`: what a person sees of a run's checkpoints, whole and damaged."""

import json
from pathlib import Path

import pytest
import torch

from bagualu.comm.group import Group
from bagualu.fault_tolerance.checkpoint.save import save
from bagualu.fault_tolerance.checkpoint.shard import Piece
from bagualu.launch import cli


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    tensor = torch.arange(1000, dtype=torch.float32)
    for step in (3, 6):
        pieces = [Piece("weight/a", (1000,), (0,), tensor)]
        save(tmp_path / "checkpoints", step, pieces, {"layout": {"data": 2, "tensor": 1}}, Group("world", (0,), 0, None), keep=2)
    return tmp_path


def test_list_and_verify_of_a_whole_run(run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["checkpoint", "verify", str(run_dir)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[1] for line in lines] == ["3", "6"]
    assert all("data 2" in line and line.endswith("whole") for line in lines)


def test_a_flipped_byte_is_found_and_told_in_json(run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shard = next((run_dir / "checkpoints" / "step-00000006").glob("*.safetensors"))
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    shard.write_bytes(data)
    assert cli.main(["checkpoint", "list", str(run_dir)]) == 0  # a quick look does not read the data
    assert cli.main(["checkpoint", "verify", str(run_dir)]) == 1
    capsys.readouterr()
    assert cli.main(["checkpoint", "verify", str(run_dir), "--json"]) == 1
    first, second = json.loads(capsys.readouterr().out)
    assert first["problem"] is None
    assert "weight/a" in second["problem"]

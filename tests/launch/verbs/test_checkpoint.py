"""`bagualu checkpoint`: what a person sees of a run's checkpoints, whole and damaged."""

import json
from pathlib import Path
from unittest import mock

import pytest
import torch
from safetensors.torch import load_file

from bagualu.comm.group import Group
from bagualu.fault_tolerance.checkpoint.layout import format
from bagualu.fault_tolerance.checkpoint.layout.quarantine import set_aside
from bagualu.fault_tolerance.checkpoint.saving.save import save
from bagualu.launch import cli
from bagualu.parallel.boxes import TensorPiece
from bagualu.trainer.recipe.compose import load_recipe
from tests.trainer.models.hugging_face.published import publish


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    tensor = torch.arange(1000, dtype=torch.float32)
    for step in (3, 6):
        pieces = [TensorPiece("weight/a", (1000,), (0,), tensor)]
        metadata = {"layout": {"data": 2, "tensor": 1}, "guard": {"losses": [1.0] * 64, "norms": [2.0] * 64, "setbacks": 0}}
        save(tmp_path / "checkpoints", step, pieces, metadata, Group("world", (0,), 0, None), keep=2)
    return tmp_path


def test_list_and_verify_of_a_whole_run(run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["checkpoint", "verify", str(run_dir)]) == 0
    title, *lines = capsys.readouterr().out.splitlines()
    assert title.split() == ["step", "saved", "size", "shards", "layout", "health"]
    assert [line.split()[0] for line in lines] == ["3", "6"]
    assert all("data 2" in line and line.rstrip().endswith("whole") for line in lines)


def test_the_home_directory_may_be_meant_by_a_tilde(
    run_dir: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HOME", str(run_dir.parent))
    assert cli.main(["checkpoint", "list", f"~/{run_dir.name}"]) == 0
    assert cli.main(["checkpoint", "list", f"run.dir=~/{run_dir.name}"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 6


def test_one_checkpoint_alone(run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = run_dir / "checkpoints" / "step-00000003"
    assert cli.main(["checkpoint", "verify", str(path), "--json"]) == 0
    (row,) = json.loads(capsys.readouterr().out)
    assert (row["path"], row["step"], row["tensors"], row["shards"], row["problems"]) == (str(path), 3, 1, 1, [])
    assert row["metadata"] == {"layout": {"data": 2, "tensor": 1}, "guard": {"setbacks": 0}}
    aside = set_aside(path)
    assert cli.main(["checkpoint", "list", str(path)]) == 2
    assert "does not exist" in capsys.readouterr().err
    assert cli.main(["checkpoint", "list", str(run_dir)]) == 0
    assert f"set aside as damaged: {aside}" in capsys.readouterr().out
    assert cli.main(["checkpoint", "verify", str(aside)]) == 0  # a look at what was set aside


def test_every_damaged_block_is_named(run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = run_dir / "many"
    with mock.patch.object(format, "BLOCK_BYTES", 256):
        pieces = [TensorPiece(name, (100,), (0,), torch.arange(100.0)) for name in ("a", "b")]
        save(root / "checkpoints", 1, pieces, {}, Group("world", (0,), 0, None), keep=1)
    (shard,) = (root / "checkpoints" / "step-00000001").glob("*.safetensors")
    data = bytearray(shard.read_bytes())
    places = [len(data) - 800, len(data) - 401, len(data) - 1]  # first block of a, last of a, last of b
    for at in places:
        data[at] ^= 1
    shard.write_bytes(data)
    assert cli.main(["checkpoint", "verify", str(root)]) == 1
    out = capsys.readouterr().out
    assert "3 problems" in out
    named = [line.split("tensor ")[1].split()[0] + line.split("at byte ")[1].split(";")[0] for line in out.splitlines()[2:]]
    assert named == [f"a{len(data) - 800}", f"a{len(data) - 544}", f"b{len(data) - 144}"]
    (shard.parent / "manifest.json").unlink()
    assert cli.main(["checkpoint", "list", str(root)]) == 1
    assert "manifest.json cannot be read" in capsys.readouterr().out


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
    assert first["problems"] == []
    assert "weight/a" in second["problems"][0]


def test_a_model_of_hugging_face_comes_in_and_goes_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    publish("llama", tmp_path / "published", torch.bfloat16)
    assert cli.main(["checkpoint", "import", str(tmp_path / "published"), f"to={tmp_path}/run", "--json"]) == 0
    brought = json.loads(capsys.readouterr().out)
    assert brought["path"] == str(tmp_path / "run/checkpoints/step-00000000")
    assert cli.main(["checkpoint", "verify", str(tmp_path / "run")]) == 0
    capsys.readouterr()
    assert cli.main(["checkpoint", "export", str(tmp_path / "run"), f"to={tmp_path}/exported", "dtype=float32"]) == 0
    taken = capsys.readouterr().out
    assert taken.startswith(f"{brought['parameters']:,} parameters, ")
    assert taken.endswith(f": {tmp_path}/exported\n")
    assert 2 * brought["bytes"] == sum(tensor.nbytes for tensor in load_file(tmp_path / "exported/model.safetensors").values())
    assert cli.main(["checkpoint", "export", str(tmp_path / "run"), f"to={tmp_path}/dcp", "format=dcp", "--json"]) == 0
    taken = json.loads(capsys.readouterr().out)
    assert (taken["parameters"], taken["bytes"]) == (brought["parameters"], brought["bytes"])
    assert {".metadata", "__0_0.distcp", "config.json"} <= {file.name for file in (tmp_path / "dcp").iterdir()}


def test_the_directory_where_a_person_is_is_not_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    publish("llama", tmp_path / "published")
    assert cli.main(["checkpoint", "import", str(tmp_path / "published"), f"to={tmp_path}/run"]) == 0
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path / "empty")
    capsys.readouterr()
    assert cli.main(["checkpoint", "export", str(tmp_path / "run"), "to=."]) == 2
    assert capsys.readouterr().err == (
        "bagualu: error: to=. is the directory from which this was started, and is replaced; give a new directory\n"
    )
    assert cli.main(["checkpoint", "import", str(tmp_path / "published"), "to=."]) == 0
    assert load_recipe(tmp_path / "empty/config.yaml").run.name == "empty"


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["import", "PUBLISHED"], "give bagualu checkpoint import HF_DIR to=RUN"),
        (["import", "PUBLISHED", "to="], "give bagualu checkpoint import HF_DIR to=RUN"),
        (["import", "PUBLISHED", "to=RUN", "dtype=float32"], "give bagualu checkpoint import HF_DIR to=RUN"),
        (["import", "NONE", "to=RUN"], "NONE is no directory; give that of a model"),
        (["import", "PUBLISHED", "to=PUBLISHED"], "PUBLISHED is not empty; give another directory"),
        (["import", "PUBLISHED", "to=PUBLISHED/config.json"], "config.json is no directory; give one that is empty or missing"),
        (["export", "run", "to=PUBLISHED/config.json"], "config.json exists and is not empty; give another directory"),
        (["export", "run", "to=."], ". exists and is not empty; give another directory"),
        (["export", "PUBLISHED", "to=OTHER"], "PUBLISHED holds no checkpoint; give a run that has saved"),
        (["export", "run", "to=PUBLISHED"], "PUBLISHED exists and is not empty"),
        (["export", "run", "to=OTHER", "dtype=int8"], "dtype=int8 is unknown; give one of float64, float32"),
        (["export", "run", "to=OTHER", "format=pickle"], "format=pickle is unknown; give one of safetensors, dcp"),
        (["import", "PUBLISHED", "to=RUN", "format=dcp"], "give bagualu checkpoint import HF_DIR to=RUN"),
        (["export", "run", "other", "to=OTHER"], "give bagualu checkpoint export RUN_OR_CHECKPOINT to=HF_DIR"),
    ],
)
def test_conversions_that_cannot_be_done_are_refused(
    words: list[str], expected: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    publish("llama", tmp_path / "PUBLISHED")
    (tmp_path / "RUN").mkdir()
    if "run" in words:
        assert cli.main(["checkpoint", "import", "PUBLISHED", "to=run"]) == 0
    before = sorted(tmp_path.rglob("*"))
    assert cli.main(["checkpoint", *words]) == 2
    assert expected in capsys.readouterr().err
    assert sorted(tmp_path.rglob("*")) == before

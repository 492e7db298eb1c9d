"""`bagualu doctor`: one JSON document with the promised keys, a cluster that can be used, and refusals with the fix."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from bagualu.comm.cluster_file import load_cluster
from bagualu.comm.cost import collective_seconds
from bagualu.launch import cli
from bagualu.launch.verbs.usage import DOCTOR_KEYS
from tests.leftovers import Leftovers

ROOT = Path(__file__).parents[3]
KEYS = {"devices", "backends", "matmul_flops_per_second", "memory_bytes_per_second", "links", "disk", "operators", "problems",
        "cluster_file"}  # fmt: skip


def test_a_machine_is_measured_and_becomes_a_cluster(tmp_path: Path, leftovers: Leftovers) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    words = ["doctor", "--quick", "--json", "launch.workers=2", f"run.dir={disk}/runs/tiny", f"data.cache={tmp_path}/cache"]
    command = [sys.executable, "-m", "bagualu.launch.cli", *words, "comm.backend=gloo"]
    done = subprocess.run(command, cwd=ROOT, env=leftovers.environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    assert found.keys() >= KEYS
    assert {"name": "gloo", "works": True, "why": "works"} in found["backends"]
    assert found["matmul_flops_per_second"]["bfloat16"] > 1e9
    assert found["memory_bytes_per_second"] > 1e8
    assert {link["ranks"] for link in found["links"]} == {2}
    assert found["disk"]["path"] == str(disk)
    assert list(disk.iterdir()) == []
    assert found["cluster_file"] == str(tmp_path / "cache/this.yaml")
    two = load_cluster("this", [tmp_path / "cache"]).for_world(2)
    assert two.parts[0].chip.type == "cpu"
    assert two.parts[0].chip.peak("bfloat16") == pytest.approx(found["matmul_flops_per_second"]["bfloat16"], rel=0.001)
    assert 1e-6 < collective_seconds(two, "all_reduce", 2**20, range(2)) < 1


@pytest.mark.parametrize(
    ("words", "fix"),
    [
        (["model.layers=3"], "doctor has no key model.layers; there are launch.workers"),
        (["launch.worker=2"], "did you mean launch.workers?"),
        (["--workers=2"], "give launch.workers=2"),
        (["launch.workers=0"], "launch.workers=0 must be at least 1"),
        (["launch.workers=1,2"], "`bagualu doctor` takes one value of each key"),
        (["comm.backend=mpi"], "comm.backend=mpi cannot be measured; give one of auto, gloo, nccl"),
        (["comm.backend=simulated"], "comm.backend=simulated cannot be measured"),
        (["-m"], "unknown option -m"),
        (["--cfg", "job"], "it is an option of bagualu train"),
    ],
)
def test_wrong_words_are_refused_with_the_fix(capsys: pytest.CaptureFixture[str], words: list[str], fix: str) -> None:
    assert cli.main(["doctor", *words]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert len(err.splitlines()) == 1
    assert fix in err


def test_the_help_page_names_every_key(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["doctor", "--help"]) == 0
    page = capsys.readouterr().out
    assert all(key in page for key in DOCTOR_KEYS)

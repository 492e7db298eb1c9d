"""`bagualu doctor`: one JSON document with the promised keys, a cluster that can be used, and refusals with the fix."""

import json
import shlex
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from bagualu.comm.cluster_file import load_cluster
from bagualu.comm.cost import collective_seconds
from bagualu.launch import cli
from bagualu.launch.machine import worker_names
from bagualu.launch.verbs import doctor
from bagualu.launch.verbs.command_line import DOCTOR_KEYS
from bagualu.trainer.costs.operator_times import measurable
from bagualu.trainer.process.stop_request import StopRequest
from bagualu.trainer.recipe.config import Recipe
from tests.launch.machine.test_cluster_text import LINKS
from tests.launch.machine.test_figures import ONE
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
    assert {one["variant"] for one in found["operators"] if one["name"] == "attention"} == set(measurable("attention", "cpu"))
    assert any((tmp_path / "cache/operators").iterdir())
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


@pytest.fixture
def without_measuring(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[tuple[int, str]]:
    """Workers that answer at once, and a small file for the disk. Returns the numbers of workers and what they were asked."""
    asked: list[tuple[int, str]] = []

    def answer(recipe: Recipe, backend: str, ranks: int, entrypoint: str, stop: StopRequest) -> dict[str, Any] | str:
        asked.append((ranks, entrypoint))
        return replace(ONE, ranks=ranks, links=LINKS if ranks > 1 else []).as_dict()

    monkeypatch.setattr(doctor, "_call", answer)
    for name in ("FULL", "QUICK"):
        monkeypatch.setattr(doctor, name, replace(getattr(doctor, name), disk_bytes=2**20))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    return asked


GUIDE = [line.strip() for line in (ROOT / "docs/guides/doctor.md").read_text().splitlines() if line.startswith("    bagualu ")]


@pytest.mark.parametrize("command", GUIDE)
def test_the_commands_of_the_guide_report_what_was_measured(
    command: str, without_measuring: list[tuple[int, str]], capsys: pytest.CaptureFixture[str]
) -> None:
    words = shlex.split(command)[1:]
    assert cli.main(words) == 0
    report = capsys.readouterr().out
    assert {"--quick" in words} == {entrypoint == worker_names.MEASURE_QUICKLY for _, entrypoint in without_measuring}
    if "launch.workers=2" in words:
        assert [ranks for ranks, _ in without_measuring] == [2]
    for beginning in ("versions", "cpu", "backends", "disk", "cluster", "problems", "  products", "  memory"):
        assert f"\n{beginning} " in f"\n{report}"
    assert "  attention kernel 1 ms, blocks 2 ms (length 64, bfloat16)\n" in report
    assert max(map(len, report.splitlines())) < 200


def test_a_backend_that_fails_is_a_problem_and_no_cluster_is_written(
    without_measuring: list[tuple[int, str]], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr(doctor, "_call", lambda *arguments: "CommunicationError: no route to host")
    assert cli.main(["doctor", "--json", "comm.backend=gloo"]) == 1
    found = json.loads(capsys.readouterr().out)
    assert (found["cluster_file"], found["matmul_flops_per_second"]) == (None, None)
    (gloo,) = [backend for backend in found["backends"] if backend["name"] == "gloo"]
    assert gloo == {"name": "gloo", "works": False, "why": "CommunicationError: no route to host"}
    assert any("loopback" in problem["fix"] for problem in found["problems"])
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize(
    ("before", "now", "kept"), [("", "--quick", True), ("--quick", "--quick", False), ("--quick", "", False), ("", "", False)]
)
def test_a_quick_measurement_replaces_no_full_one(
    before: str, now: str, kept: bool, without_measuring: list[tuple[int, str]], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    file = tmp_path / "cache/bagualu/this.yaml"
    for word in (before, now):
        if file.is_file():
            file.write_text(f"{file.read_text()}# written before\n")
        capsys.readouterr()
        assert cli.main(["doctor", *filter(None, [word])]) == 0
    report = capsys.readouterr().out
    assert ("# written before" in file.read_text()) is kept
    assert ("keeps" in report) is kept
    assert load_cluster("this", [file.parent]).quick is (now == "--quick" and not kept)
    assert cli.main(["doctor", "--json", *filter(None, [now])]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["cluster_file"], found["cluster_written"]) == (str(file), not kept)


def test_a_file_that_cannot_be_read_is_replaced_by_a_quick_measurement(
    without_measuring: list[tuple[int, str]], tmp_path: Path
) -> None:
    file = tmp_path / "cache/bagualu/this.yaml"
    file.parent.mkdir(parents=True)
    file.write_text("chip: 3")
    assert cli.main(["doctor", "--quick"]) == 0
    assert load_cluster("this", [file.parent]).quick


def test_a_cache_that_cannot_be_written_is_refused(
    without_measuring: list[tuple[int, str]], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("")
    assert cli.main(["doctor", "data.cache=file/cache"]) == 2
    assert "give data.cache=FOLDER with room to write" in capsys.readouterr().err


def test_the_help_page_names_every_key(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["doctor", "--help"]) == 0
    page = capsys.readouterr().out
    assert all(key in page for key in DOCTOR_KEYS)

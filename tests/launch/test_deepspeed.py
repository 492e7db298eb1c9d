"""A run on DeepSpeed as people start it: nothing is compiled or printed, no other library is asked where the ranks are."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.launch.warm import ROOT, Launcher
from tests.leftovers import Leftovers

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="forks launchers with what only Linux has")
WORDS = (
    *("recipe=tiny_dense", "model.layers=2", "model.hidden=32", "model.heads=2", "model.ffn=64", "data=random", "model.vocab=256"),
    *("data.sequence_length=32", "data.global_batch=4", "train.micro_batch=2", "parallel.data=2", "parallel.pipeline=1"),
    *("train.validation_sequences=0", "optim.warmup_steps=1", "optim.schedule=constant", "log.every=1"),
)  # fmt: skip


ABOUT_FILE = "parallel.deepspeed.config="


def bagualu(folder: Path, leftovers: Leftovers, *words: str) -> subprocess.CompletedProcess[str]:
    """Runs `bagualu train` where neither a compiler nor ninja can be found."""
    tools = folder / "no tools"
    if not tools.exists():
        tools.mkdir()
        (tools / "sh").symlink_to("/bin/sh")
    own = {"PATH": str(tools), "TORCH_EXTENSIONS_DIR": str(folder / "compiled")}
    kept = {key: value for key, value in leftovers.environment.items() if key not in ("LOCAL_RANK", "RANK", "DS_ACCELERATOR")}
    words = ("train", *WORDS, f"run.dir={folder / 'run'}", *words)
    with Launcher(words, None, cwd=folder, env={**kept, **own, "PYTHONPATH": str(ROOT)}) as launcher:
        try:
            out, err = launcher.communicate(timeout=240)
        finally:
            launcher.kill()
    assert launcher.returncode == 0, err
    return subprocess.CompletedProcess(words, 0, out, err)


def losses(folder: Path) -> dict[int, float]:
    records = map(json.loads, (folder / "run" / "metrics.jsonl").read_text().splitlines())
    return {record["step"]: record["loss"] for record in records}


def assert_quiet(folder: Path, done: subprocess.CompletedProcess[str]) -> None:
    """`done` has printed what every run prints, and perhaps a line about its file, and has compiled nothing."""
    assert done.stdout.startswith("done: step ")
    usual = ("data: ", "memory ", "step ", "saved ", ABOUT_FILE)
    for log in (folder / "run" / "logs").iterdir():
        assert [line for line in log.read_text().splitlines() if not line.startswith(usual)] == []
    assert len(done.stderr.splitlines()) == 3 + done.stderr.count("\nstep ") + done.stderr.count(f"\n{ABOUT_FILE}")
    assert not (folder / "compiled").exists()


def test_a_run_compiles_nothing_and_prints_only_its_own(tmp_path: Path, leftovers: Leftovers) -> None:
    """Also with a file that wants DeepSpeed to print, and whose defaults the recipe replaces."""
    file = tmp_path / "ds.json"
    file.write_text(json.dumps({"steps_per_print": 1, "wall_clock_breakdown": False}))
    words = ("parallel.zero=1", "train.dtype=bfloat16", "train.steps=3", "optim.clip_norm=0.5", f"parallel.deepspeed.config={file}")
    done = bagualu(tmp_path, leftovers, "parallel.engine=deepspeed", *words)
    assert_quiet(tmp_path, done)
    assert [line for line in done.stderr.splitlines() if line.startswith(ABOUT_FILE)] == [
        f"{ABOUT_FILE}{file} leaves out keys that the recipe decides: "
        "optim.clip_norm=0.5, not DeepSpeed's default gradient_clipping=1.0"
    ]
    assert not list((tmp_path / "run").rglob("*.pt"))


@pytest.mark.slow
def test_a_run_changes_its_engine_when_it_resumes(tmp_path: Path, leftovers: Leftovers) -> None:
    """It trains the losses of the run that stays on the native engine."""
    (tmp_path / "native").mkdir()
    bagualu(tmp_path / "native", leftovers, "train.steps=9")
    for engine, zero, steps in (("deepspeed", 3, 3), ("native", 2, 6), ("deepspeed", 2, 9)):
        resume = "true" if steps > 3 else "false"
        words = (f"parallel.engine={engine}", f"parallel.zero={zero}", f"train.steps={steps}", f"checkpoint.resume={resume}")
        assert_quiet(tmp_path, bagualu(tmp_path, leftovers, *words))
    expected = losses(tmp_path / "native")
    assert losses(tmp_path) == pytest.approx(expected, rel=2e-5)
    assert len(expected) == 9

"""Many faults, one after the other, drawn from a seed: the run ends as if nothing had happened, and leaves nothing behind."""

import json
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from bagualu.fault_tolerance.injection.plan import DRAWN
from bagualu.launch.cli import main
from bagualu.trainer.recipe.compose import load_recipe
from tests.launch.warm import Launcher
from tests.leftovers import Leftovers
from tests.standing import assert_stood

ROOT = Path(__file__).parents[2]
EVERY = 4
LINUX = pytest.mark.skipif(sys.platform != "linux", reason="forks launchers with what only Linux has")
RECIPE = [
    "recipe=tiny_dense", "data.source=random", "data.sequence_length=8", "data.global_batch=8", "train.micro_batch=1",
    "model.layers=2", "model.hidden=8", "model.heads=2", "model.kv_heads=2", "model.ffn=16", "model.vocab=64",
    "train.dtype=float64", "train.validate_every=10", "train.validation_sequences=3", "log.progress=off",
    f"checkpoint.every={EVERY}", "parallel.data=2", "parallel.pipeline=2",
]  # fmt: skip
TWO_RANKS = ["parallel.pipeline=1"]
"""A start of four takes twice as long, and each of these runs has six."""
ON_DEEPSPEED = ["parallel.pipeline=1", "parallel.data=4", "train.dtype=float32"]
ENTRYPOINT = "tests.standing:train_noting_samples"


def assert_all_stood(folder: Path, document: dict[str, Any], count: int, seconds: float) -> None:
    assert document["planned"] == count
    assert document["survived"] + document["without_effect"] == count, document["faults"]
    assert document["without_effect"] <= count // 2  # what is rehearsed shows something
    assert document["as_promised"]
    most_lost = 3 * EVERY  # the newest may be damaged, the next one still on its way to the disk
    assert_stood(folder / "rehearsed", folder / "uninterrupted", most_lost, seconds)
    assert document["ledger"]["restarts"] == sum(row["recovery_seconds"] is not None for row in document["faults"])


def soak_as_threads(folder: Path, steps: int, seed: int, capsys: pytest.CaptureFixture[str], *more: str) -> set[str]:
    """20 faults in `steps` steps; their kinds."""
    words = [
        *RECIPE, "comm.backend=simulated", f"run.dir={folder}/run", f"run.seed={seed}", f"train.steps={steps}",
        "faults=random:20", "--json", *more,
    ]  # fmt: skip
    started = time.monotonic()
    code = main(["rehearse", *words], ENTRYPOINT)
    out, err = capsys.readouterr()
    assert code == 0, f"{out}\n{err[-4000:]}"
    document: dict[str, Any] = json.loads(out)
    assert_all_stood(folder / "run-rehearsal", document, 20, time.monotonic() - started)
    return {row["fault"].split("@")[0] for row in document["faults"]}


def test_20_faults_on_ranks_that_are_threads(tmp_path: Path, capsys: pytest.CaptureFixture[str], leftovers: Leftovers) -> None:
    assert soak_as_threads(tmp_path, 44, 11, capsys) == set(DRAWN)


@pytest.mark.usefixtures("leftovers")
@pytest.mark.parametrize("policy", ["skip", "rollback"])
def test_samples_that_the_guard_leaves_out_are_told_and_the_rest_is_equal(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], policy: str
) -> None:
    words = [*RECIPE, "comm.backend=simulated", f"run.dir={tmp_path}/run", "train.steps=12", f"guard.on_nonfinite={policy}"]
    assert main(["rehearse", *words, "faults=[nan@step=7:rank=1, kill@step=10:rank=2]"], ENTRYPOINT) == 0
    out = capsys.readouterr().out
    assert "the guard left out the samples of steps 7, as its policy says" in out
    assert "final state equal to the uninterrupted run of guard.leave_out=[7], bit for bit" in out
    rehearsed, uninterrupted = (tmp_path / "run-rehearsal" / name for name in ("rehearsed", "uninterrupted"))
    assert load_recipe(uninterrupted / "config.yaml").guard.leave_out == [7]
    assert load_recipe(rehearsed / "config.yaml").guard.leave_out == []
    assert_stood(rehearsed, uninterrupted, 2 * EVERY)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_200_faults_on_ranks_that_are_threads(tmp_path: Path, capsys: pytest.CaptureFixture[str], leftovers: Leftovers) -> None:
    for seed in range(10):
        soak_as_threads(tmp_path / str(seed), 60, seed, capsys, f"checkpoint.replica_every={seed % 3}")


def soak_as_processes(folder: Path, leftovers: Leftovers, count: int, *more: str) -> set[str]:
    """`count` faults, whose kinds are returned."""
    words = [*RECIPE, "comm.backend=gloo", f"run.dir={folder}/run", "launch.threads=1", "--json", *more]
    started = time.monotonic()
    environment = {**leftovers.environment, "PYTHONPATH": str(ROOT)}
    with Launcher(["rehearse", *words], ENTRYPOINT, cwd=ROOT, env=environment) as launcher:
        try:
            out, err = launcher.communicate(timeout=600)
        finally:
            launcher.kill()
    assert launcher.returncode == 0, f"{out}\n{err[-4000:]}"
    document: dict[str, Any] = json.loads(out)
    assert_all_stood(folder / "run-rehearsal", document, count, time.monotonic() - started)
    return {row["fault"].split("@")[0] for row in document["faults"]}


@LINUX
@pytest.mark.timeout(900)  # DeepSpeed's ranks, four at a time, load for long at each of the restarts
@pytest.mark.parametrize(
    "more",
    [
        TWO_RANKS,
        pytest.param([], marks=pytest.mark.slow),
        pytest.param(["parallel.engine=fsdp"], marks=pytest.mark.slow),
        pytest.param(["parallel.engine=fsdp", "checkpoint.replica_every=1"], marks=pytest.mark.slow),
        pytest.param(["parallel.zero=3"], marks=pytest.mark.slow),
        pytest.param(["parallel.zero=3", "checkpoint.replica_every=1"], marks=pytest.mark.slow),
        *(
            pytest.param(["parallel.engine=deepspeed", f"parallel.zero={stage}", *ON_DEEPSPEED], marks=pytest.mark.slow)
            for stage in (1, 2, 3)
        ),
        pytest.param(
            ["parallel.engine=deepspeed", "parallel.zero=3", *ON_DEEPSPEED, "checkpoint.replica_every=1"], marks=pytest.mark.slow
        ),
    ],
    ids=lambda more: " ".join([*more[:2], *more[-1:]] if "replica" in " ".join(more) else more[:2]),
)
def test_faults_on_ranks_that_are_processes(tmp_path: Path, leftovers: Leftovers, more: list[str]) -> None:
    third, last = (1, 1) if more == TWO_RANKS else (2, 3)
    planned = (
        f"faults=[kill@step=3:rank={third}:at=reduce, slow@step=5:rank=0:steps=2, corrupt@step=6, "
        f"exception@step=7:rank=0:at=optimizer, stop@step=10:rank={last}:seconds=0.5, nan@step=11:rank=1, "
        f"full_disk@step=12:rank={third}, kill@step=14:rank=0:at=backward]"
    )
    soak_as_processes(tmp_path, leftovers, 8, "checkpoint.every=2", "checkpoint.async=false", "train.steps=16", planned, *more)


@LINUX
def test_random_faults_on_ranks_that_are_processes(tmp_path: Path, leftovers: Leftovers) -> None:
    """Two ranks, since each of the two restarts takes seconds here, with saves in the background."""
    drawn = [
        "parallel.pipeline=1",
        "checkpoint.every=2",
        "train.steps=24",
        "run.seed=15",
        "faults=random:4:kill+drop_link+corrupt+full_disk",
    ]
    assert len(soak_as_processes(tmp_path, leftovers, 4, *drawn)) == 4


@LINUX
@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_200_faults_on_ranks_that_are_processes(tmp_path: Path, leftovers: Leftovers) -> None:
    """On four ranks with a pipeline and on two without, with replicas and without."""
    for seed in range(20):
        drawn = [
            f"run.seed={seed}", "train.steps=40", "checkpoint.every=2", f"checkpoint.replica_every={seed // 2 % 2}",
            f"parallel.pipeline={1 + seed % 2}", "faults=random:10:kill+exception+drop_link+corrupt+full_disk+nan",
        ]  # fmt: skip
        soak_as_processes(tmp_path / str(seed), leftovers, 10, *drawn)

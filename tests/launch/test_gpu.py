"""Whole runs on an NVIDIA GPU: the curve of the CPU, faults that leave no trace, and the way from one to the other."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from bagualu.comm.cluster_file import load_cluster
from bagualu.trainer.process import environment
from tests.launch.survival import SMALL
from tests.standing import assert_same_curve

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(300)]
ROOT = Path(__file__).parents[2]
ONE = ["parallel.data=1", "train.steps=8", "checkpoint.every=2", "model.hidden=64", "log.progress=off"]
MOE = ["model.moe.experts=4", "model.moe.top_k=2", "model.moe.ffn=24", "model.moe.every=2", "model.moe.shared_experts=1"]


def bagualu(verb: str, folder: Path, *words: str) -> dict[str, Any]:
    """The document that the command prints."""
    code = "import sys; from bagualu.launch.cli import main; sys.exit(main())"
    command = [sys.executable, "-c", code, verb, *SMALL, *ONE, *words, f"run.dir={folder}", "--json"]
    outside = {name: value for name, value in os.environ.items() if name != environment.CUBLAS}  # which the launcher sees to
    done = subprocess.run(command, cwd=ROOT, env=outside, capture_output=True, text=True)
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    document: dict[str, Any] = json.loads(done.stdout)
    return document


@pytest.fixture(scope="module")
def on_cpu(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cpu") / "run"
    bagualu("train", folder, *MOE)
    return folder


@pytest.mark.parametrize(
    "words",
    [
        [],
        ["train.recompute=full"],
        ["train.recompute=attention", "train.offload_bytes=100000000"],
        ["train.compile=true"],
    ],
    ids=str,
)
def test_it_is_the_curve_of_the_cpu(tmp_path: Path, on_cpu: Path, words: list[str]) -> None:
    bagualu("train", tmp_path / "run", *MOE, "comm.backend=nccl", *words)
    assert_same_curve(tmp_path / "run", on_cpu)


def test_ranks_that_share_a_gpu_are_the_curve_of_the_cpu(tmp_path: Path, on_cpu: Path) -> None:
    layout = ["parallel.data=2", "parallel.expert=2", "parallel.tensor=2", "parallel.pipeline=2"]
    bagualu("train", tmp_path / "run", *MOE, *layout, "comm.backend=simulated", "comm.device=cuda")
    assert_same_curve(tmp_path / "run", on_cpu)


@pytest.mark.parametrize(("first", "then"), [("nccl", "gloo"), ("gloo", "nccl")])
def test_a_run_goes_on_on_the_other(tmp_path: Path, on_cpu: Path, first: str, then: str) -> None:
    """It is killed in step 5, and started again by hand."""
    killed = ["faults=[kill@step=5]", "restart.limit=0"]
    with pytest.raises(AssertionError, match="SIGKILL"):
        bagualu("train", tmp_path / "run", *MOE, f"comm.backend={first}", *killed)
    bagualu("train", tmp_path / "run", *MOE, f"comm.backend={then}", "checkpoint.resume=true")
    assert_same_curve(tmp_path / "run", on_cpu)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_faults_leave_no_trace(tmp_path: Path, dtype: str) -> None:
    faults = "faults=[kill@step=4,nan@step=5,stop@step=6:seconds=1,exception@step=7]"
    document = bagualu("rehearse", tmp_path / "run", *MOE, "comm.backend=nccl", f"train.dtype={dtype}", faults)
    assert document["as_promised"]
    assert document["equal"]
    assert document["ledger"]["restarts"] == 2


def test_doctor_measures_the_gpu_and_predicts_runs_on_it(tmp_path: Path) -> None:
    code = "import sys; from bagualu.launch.cli import main; sys.exit(main())"
    cache = f"data.cache={tmp_path}/cache"
    commands = [
        ["doctor", "--quick", "comm.backend=nccl", "launch.workers=1", cache, f"run.dir={tmp_path}/run"],
        ["simulate", "recipe=bench_dense_1b", "cluster=this", "world=1", cache],
    ]
    for words in commands:
        done = subprocess.run([sys.executable, "-c", code, *words, "--json"], cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
        document: dict[str, Any] = json.loads(done.stdout)
        if words[0] == "doctor":
            assert document["ranks"][0]["device"] == "cuda"
            assert document["matmul_flops_per_second"]["bfloat16"] > 1e13
    assert document["fits"]
    chip = load_cluster("this", [tmp_path / "cache"]).for_world(1).parts[0].chip
    assert (chip.type, chip.vendor) == ("cuda", "NVIDIA")
    assert chip.cores

"""train.compile changes how fast a run is, not where it goes."""

import json
import shutil

import pytest

from bagualu.trainer.run import train
from tests.harness import run
from tests.launch.survival import small
from tests.standing import assert_same_curve


def trained(communicator, folder, *words):
    train(small(folder, "train.steps=3", "checkpoint.every=3", *words), communicator)


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("g++"), reason="generating kernels needs a C++ compiler (g++ on PATH)")
@pytest.mark.parametrize(
    "words",
    [
        ["parallel.data=2"],
        ["parallel.data=2", "parallel.zero=3"],
        ["parallel.data=2", "parallel.engine=fsdp"],
        ["parallel.data=2", "parallel.engine=deepspeed", "train.dtype=float32"],
        ["parallel.data=2", "train.recompute=full"],
        ["parallel.tensor=2", "parallel.sequence=true", "train.recompute=attention", "train.offload_bytes=100000"],
        ["parallel.data=1", "parallel.tensor=2", "parallel.sequence=true"],
        ["parallel.pipeline=2"],
        ["parallel.pipeline=2", "parallel.schedule=zb_h1"],
        ["parallel.pipeline=2", "parallel.schedule=zb_v", "model.layers=4"],
        ["parallel.expert=2", "parallel.data=2", "model.moe.experts=4", "model.moe.ffn=16"],
    ],
    ids=" ".join,
)
def test_compiled_and_eager_are_one_curve(tmp_path, words):
    for compiled in ("false", "true"):
        run("gloo", 2, trained, tmp_path / compiled, f"train.compile={compiled}", "parallel.data=1", *words)
        assert json.loads((tmp_path / compiled / "summary.json").read_text())["compile"] is (compiled == "true")
    assert_same_curve(tmp_path / "true", tmp_path / "false", 1e-4 if "train.dtype=float32" in words else 1e-9)

"""train.compile changes how fast a run is, not where it goes."""

import json
import shutil

import pytest

from bagualu.trainer.run import train
from tests.harness import run
from tests.launch.survival import small
from tests.standing import assert_same_curve, assert_same_run


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


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("g++"), reason="generating kernels needs a C++ compiler (g++ on PATH)")
@pytest.mark.parametrize(
    "words",
    [
        ["parallel.engine=native"],
        ["parallel.engine=fsdp"],
        ["optim.name=muon"],
        ["parallel.zero=0", "optim.clip_norm=0.01", "model.tie_embeddings=true"],
        ["parallel.zero=3"],
    ],
    ids=" ".join,
)
def test_updates_by_a_generated_kernel_are_one_curve_with_those_by_torchs(tmp_path, words):
    for variant in ("fused", "generated"):
        run("gloo", 2, trained, tmp_path / variant, f"operators.update={variant}", "parallel.data=2", *words)
    assert_same_curve(tmp_path / "generated", tmp_path / "fused", 1e-9)


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("g++"), reason="generating kernels needs a C++ compiler (g++ on PATH)")
def test_a_run_goes_on_with_another_update(tmp_path):
    changes = {"changed": "generated", "same": "fused"}
    for folder, variant in changes.items():
        run("gloo", 2, trained, tmp_path / folder, "parallel.data=2", "operators.update=fused")
        more = ["checkpoint.resume=true", "train.steps=6", f"operators.update={variant}"]
        run("gloo", 2, trained, tmp_path / folder, "parallel.data=2", *more)
        record = json.loads((tmp_path / folder / "operators.json").read_text())
        assert record["operators"]["update"]["variant"] == variant
    assert_same_curve(tmp_path / "changed", tmp_path / "same", 1e-9)


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("g++"), reason="generating kernels needs a C++ compiler (g++ on PATH)")
@pytest.mark.parametrize(
    "words",
    [[], ["train.recompute=full", "train.dtype=bfloat16"], ["operators.update=generated", "train.dtype=bfloat16"]],
    ids=" ".join,
)
def test_a_compiled_run_that_resumes_has_the_same_bits(tmp_path, words):
    """Validation and the head's last chunk bring other sizes in between."""
    sizes = ["data.sequence_length=96", "data.global_batch=16", "train.micro_batch=16"]
    words = [*sizes, "train.compile=true", "train.validate_every=1", "comm.backend=gloo", "parallel.data=1", *words]
    run("gloo", 1, trained, tmp_path / "whole", *words, "train.steps=4", "checkpoint.every=2")
    run("gloo", 1, trained, tmp_path / "again", *words, "train.steps=2", "checkpoint.every=2")
    run("gloo", 1, trained, tmp_path / "again", *words, "train.steps=4", "checkpoint.every=2", "checkpoint.resume=true")
    assert_same_run(tmp_path / "again", tmp_path / "whole")

"""train.compile changes how fast a run is, not where it goes."""

import shutil

import pytest

from bagualu.trainer.run import train
from tests.harness import COMPILES, run
from tests.launch.survival import small
from tests.standing import assert_same_curve


def trained(communicator, folder, *words):
    train(small(folder, "train.steps=3", "checkpoint.every=3", *words), communicator)


@pytest.mark.slow
@COMPILES
@pytest.mark.skipif(not shutil.which("g++"), reason="torch.compile needs a C++ compiler (g++ on PATH)")
@pytest.mark.parametrize(
    "words",
    [
        ["parallel.data=2"],
        ["parallel.data=2", "parallel.zero=3"],
        ["parallel.data=2", "parallel.engine=fsdp"],
        ["parallel.data=2", "train.recompute=full"],
        ["parallel.tensor=2", "parallel.sequence=true", "train.recompute=attention", "train.offload_bytes=100000"],
        ["parallel.data=1", "parallel.tensor=2", "parallel.sequence=true"],
        ["parallel.pipeline=2"],
    ],
)
def test_compiled_and_eager_are_one_curve(tmp_path, monkeypatch, words):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "compiled"))
    for compiled in ("false", "true"):
        run("gloo", 2, trained, tmp_path / compiled, f"train.compile={compiled}", "parallel.data=1", *words)
    assert_same_curve(tmp_path / "true", tmp_path / "false")

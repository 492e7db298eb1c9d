"""What comm.backend=auto stands for, on machines with and without GPUs, and for runs that go on."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from bagualu.comm.errors import RecipeError
from bagualu.launch.cli import main
from bagualu.trainer.recipe import choose_backend as chooser
from bagualu.trainer.recipe import preflight
from bagualu.trainer.recipe.choose_backend import Choice, choose_backend, gpu_count
from bagualu.trainer.recipe.compose import compose, load_recipe, save_recipe

WORDS = ["recipe=tiny_dense", "parallel.data=2", "parallel.pipeline=1", "data.source=random"]


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch):
    """machine(gpus, torch_has_cuda) makes this machine one of that kind."""

    def make(gpus: int, torch_has_cuda: bool = True) -> None:
        monkeypatch.setattr(chooser, "gpu_count", lambda: gpus)
        monkeypatch.setattr(preflight, "gpu_count", lambda: gpus)
        monkeypatch.setattr(chooser, "torch_has_cuda", lambda: torch_has_cuda)

    return make


@pytest.mark.parametrize(
    ("gpus", "cuda", "backend", "why"),
    [
        (0, True, "gloo", "no NVIDIA GPU here"),
        (1, True, "gloo", "1 GPU here for 2 workers"),
        (2, True, "nccl", "a GPU for each worker"),
        (8, True, "nccl", "a GPU for each worker"),
        (8, False, "gloo", "the installed torch is built without CUDA, so the GPUs here are not used"),
    ],
)
def test_it_is_nccl_where_each_worker_has_a_gpu_that_torch_can_use(machine, gpus, cuda, backend, why):
    machine(gpus, cuda)
    recipe, choice = choose_backend(compose(WORDS), 2)
    assert (recipe.comm.backend, choice) == (backend, Choice(backend, why))
    assert recipe.comm.on_cpu == (backend == "gloo")


@pytest.mark.parametrize("backend", ["gloo", "nccl", "simulated"])
def test_a_backend_that_is_named_stays(machine, backend):
    machine(0)
    recipe, choice = choose_backend(compose([*WORDS, f"comm.backend={backend}"]), 2)
    assert (recipe.comm.backend, str(choice)) == (backend, f"comm.backend={backend}")


@pytest.mark.parametrize(
    ("began", "gpus", "backend", "why"),
    [
        ("gloo", 0, "gloo", "on CPUs, as the run began"),
        ("gloo", 2, "gloo", "on CPUs, as the run began; comm.backend=nccl takes the GPUs"),
        ("simulated", 2, "gloo", "on CPUs, as the run began; comm.backend=nccl takes the GPUs"),
        ("nccl", 2, "nccl", "as the run began"),
        ("nccl", 0, "gloo", "no NVIDIA GPU here"),
        ("gone", 2, "nccl", "a GPU for each worker"),
    ],
)
def test_a_run_that_goes_on_keeps_what_it_began_with(machine, tmp_path, began, gpus, backend, why):
    machine(gpus)
    words = [*WORDS, f"run.dir={tmp_path}/run"]
    save_recipe(compose([*words, f"comm.backend={began}"]))
    assert choose_backend(compose([*words, "checkpoint.resume=true"]), 2)[1].why != "as the run began", "it has done nothing yet"
    (tmp_path / "run" / "metrics.jsonl").write_text("{}\n")
    recipe, choice = choose_backend(compose([*words, "checkpoint.resume=true"]), 2)
    assert (recipe.comm.backend, choice.why) == (backend, why)


def test_the_keys_of_gpus_are_checked_against_the_backend_that_was_chosen(machine, capsys, tmp_path):
    machine(0)
    assert main(["train", *WORDS, "train.deterministic=false", f"run.dir={tmp_path}/run"]) == 2
    assert "train.deterministic=false is for GPUs" in capsys.readouterr().err
    machine(2)
    recipe, _ = choose_backend(compose([*WORDS, "train.deterministic=false"]), 2)
    recipe.validate(2)
    with pytest.raises(RecipeError, match=r"give one of auto, gloo, nccl, simulated"):
        preflight.check(compose([*WORDS, "comm.backend=cuda"]), 2)


def test_no_gpu_is_seen_where_none_is_visible():
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    code = f"from {gpu_count.__module__} import gpu_count; print(gpu_count())"
    assert subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True).stdout == "0\n"


def test_the_first_line_says_which_it_is_and_config_yaml_holds_it(machine, capsys, tmp_path):
    machine(0)
    words = [*WORDS, "parallel.data=1", "train.steps=1", "data.global_batch=2", "train.micro_batch=1", "model.layers=1",
             "checkpoint.every=0", "train.validation_sequences=0", f"run.dir={tmp_path}/run"]  # fmt: skip
    assert main(["train", *words], entrypoint="tests.trainer.recipe.test_choose_backend:nothing") == 0
    first = capsys.readouterr().err.splitlines()[0]
    assert "one rank (native, ZeRO-1) as 1 process with comm.backend=gloo (no NVIDIA GPU here), in " in first
    assert load_recipe(tmp_path / "run" / "config.yaml").comm.backend == "gloo"


def nothing(recipe, communicator, stop, scratch: Path | None = None):
    return {"ended": "done", "step": 1, "steps": 1, "loss": 1.0, "run_dir": recipe.run.dir}

"""Checks a recipe against the files and the machine before training starts."""

import os
import socket
from pathlib import Path

from bagualu.comm.config import AUTO
from bagualu.comm.errors import RecipeError
from bagualu.comm.interface import LOOPBACK
from bagualu.fault_tolerance.checkpoint.layout.directory import latest
from bagualu.fault_tolerance.checkpoint.layout.format import step_of
from bagualu.fault_tolerance.checkpoint.saving.fence import EPOCH
from bagualu.fault_tolerance.run_directory import RunDirectory
from bagualu.trainer.data.config import RANDOM
from bagualu.trainer.data.corpus import check_source, trains_tokenizer
from bagualu.trainer.recipe.choose_backend import gpu_count, registered
from bagualu.trainer.recipe.compose import load_recipe
from bagualu.trainer.recipe.config import Recipe
from bagualu.trainer.recipe.deepspeed import require_deepspeed
from bagualu.trainer.recipe.override_text import typed
from bagualu.trainer.recipe.wandb_login import require_login

_KEPT = (("run", "seed"), *(("data", key) for key in ("validation_fraction", "sequence_length", "global_batch", "packing")))
"""Keys besides the model that a resumed run may not change. data.source may change, since the tokens show if the text is the
same."""


def workers_per_node(recipe: Recipe) -> int:
    """Returns the number of worker processes on each node. Raises RecipeError if the ranks do not divide evenly among the nodes."""
    recipe.launch.validate()
    recipe.parallel.validate()
    world, nodes = recipe.world_size(), recipe.launch.nodes
    if world % nodes:
        raise RecipeError(f"launch.nodes={nodes} do not divide the {world} ranks of the layout; give launch.workers, the "
                          f"workers of one node, or another layout")  # fmt: skip
    return world // nodes


def check(recipe: Recipe, world: int) -> None:
    """Checks the recipe for `world` ranks, the backend and the versions of torch and DeepSpeed that it needs, and the text that it
    names. Raises RecipeError."""
    recipe.validate(world)
    if recipe.model.lora.rank and recipe.model.origin is None:
        raise RecipeError(f"model.lora.rank={recipe.model.lora.rank} trains factors beside weights that do not change; give "
                          "model.from, the model that has them, or leave model.lora.rank out")  # fmt: skip
    if recipe.parallel.engine == "deepspeed":
        require_deepspeed()
    known = [AUTO, *registered()]
    if recipe.comm.backend not in known:
        raise RecipeError(f"comm.backend={recipe.comm.backend} is unknown; give one of {', '.join(known)}")
    check_source(
        recipe.data,
        recipe.model.vocab,
        validation=recipe.train.validation_sequences > 0,
        run_dir=recipe.run.dir,
        length_multiple=recipe.parallel.tensor if recipe.parallel.sequence else 1,
    )


def check_machine(recipe: Recipe) -> None:
    """Checks that `bagualu train` can start the workers on this machine: a single node, enough GPUs, a usable port, a login for
    W&B if the recipe needs one. Raises RecipeError."""
    if recipe.comm.backend == "simulated" and recipe.launch.nodes > 1:
        raise RecipeError(f"comm.backend=simulated runs in one process, not on launch.nodes={recipe.launch.nodes}; "
                          f"give launch.nodes=1 or comm.backend=gloo")  # fmt: skip
    if recipe.launch.nodes > 1:
        raise RecipeError(f"launch.nodes={recipe.launch.nodes}: `bagualu train` starts workers on this machine only; use "
                          f"`bagualu slurm`, or python -m bagualu.launch.node on every node")  # fmt: skip
    workers = workers_per_node(recipe)
    if recipe.comm.backend == "nccl" and (gpus := gpu_count()) < workers:
        raise RecipeError(f"comm.backend=nccl needs {workers} GPUs here, one a worker, and finds {gpus}; "
                          f"give comm.backend=gloo" + (f" or launch.workers={gpus}" if gpus else ""))  # fmt: skip
    if recipe.comm.device == "cuda" and not gpu_count():
        raise RecipeError("comm.device=cuda needs an NVIDIA GPU, and finds none here; give comm.device=cpu")
    if recipe.launch.port is not None:
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((LOOPBACK, recipe.launch.port))
            except OSError as error:
                raise RecipeError(f"launch.port={recipe.launch.port} cannot be used ({error.strerror}); "
                                  f"give another, or leave it out for a free one") from error  # fmt: skip
    check_login(recipe)


def check_login(recipe: Recipe) -> None:
    """Checks, for log.wandb=online, that this machine has an API key for Weights & Biases. Raises RecipeError."""
    if recipe.log.wandb == "online":
        require_login()


def check_run_directory(recipe: Recipe) -> None:
    """Refuses to overwrite a run, to resume a run of another model, seed or data, or with fewer steps than it has done, or without
    its checkpoints, and to begin in a directory that cannot be written. If no run has begun in the directory, it checks only the
    last.

    Raises RecipeError, OSError."""
    run = RunDirectory(recipe.run.dir)
    directory = run.path
    if directory.exists() and not directory.is_dir():
        raise RecipeError(f"run.dir={directory} is a file; give a folder")
    _check_storage(run)
    before, newest = run.config, latest(run.checkpoints)
    if not run.has_begun() and newest is None:  # no run has done anything in it yet
        if recipe.model.origin is not None:
            _require_tokenizer(recipe, f"model.from={recipe.model.origin}")
        return
    if not recipe.checkpoint.resume:
        raise RecipeError(f"{directory} already holds a run; go on with checkpoint.resume=true, or start anew with another "
                          f"folder, e.g. run.dir={typed(str(free(directory)))}")  # fmt: skip
    then = load_recipe(before) if before.exists() else recipe
    model = then.model.identity()
    differences = {
        key: (model[key], now) for key, now in recipe.model.identity().items() if not then.model.fits(key, model[key], now)
    }
    imported = not run.has_begun() and newest is not None and step_of(newest) == 0  # no data have been trained on
    if imported:
        _require_tokenizer(recipe, f"the model imported to {directory}")
    for section, key in () if imported else _KEPT:
        was, now = getattr(getattr(then, section), key), getattr(getattr(recipe, section), key)
        if was != now:
            differences[f"{section}.{key}"] = (was, now)
    sources = then.data.source, recipe.data.source
    if sources[0] != sources[1] and RANDOM in sources and not imported:
        differences["data.source"] = sources
    for key, (was, now) in differences.items():
        what = "model" if key.startswith("model.") else "text" if key.startswith("data.") else "run"
        raise RecipeError(f"the {what} of a run stays the same: {directory} has {key}={typed(was)}, not {typed(now)}; "
                          f"give {key}={typed(was)} or another run.dir")  # fmt: skip
    done = (step_of(newest) if newest else None) or 0
    if recipe.train.steps < done:
        raise RecipeError(f"train.steps={recipe.train.steps}, but the run in {directory} has done {done} steps; give more, e.g. "
                          f"train.steps={2 * done}, or another run.dir")  # fmt: skip
    if not (run.checkpoints / EPOCH).exists():
        raise RecipeError(f"{directory} holds a run, but its checkpoints are not there; see whether the storage of "
                          f"{run.checkpoints} is mounted, or start anew with another run.dir")  # fmt: skip


def _require_tokenizer(recipe: Recipe, model: str) -> None:
    """Raises RecipeError if a tokenizer of its own would be trained on the text that `model`, trained before, goes on with."""
    if trains_tokenizer(recipe.data, recipe.run.dir):
        raise RecipeError(f"{model} has no tokenizer.json, and the tokens of a new tokenizer for the text of data.source="
                          f"{recipe.data.source} mean nothing to it; give data.tokenizer=PATH, that of the model")  # fmt: skip


def _check_storage(run: RunDirectory) -> None:
    """Checks that the run's existing folders can be written and that no file in them is a pipe or socket. Changes nothing. Raises
    RecipeError, OSError."""
    written = [run.checkpoints / EPOCH]
    for folder in (run.path, run.logs, run.checkpoints):
        if folder.is_dir() and not os.access(folder, os.W_OK | os.X_OK):
            raise RecipeError(f"{folder} cannot be written (its file system is read-only, or not yours); make it writable or "
                              "give another run.dir")  # fmt: skip
        if folder != run.checkpoints and folder.is_dir():
            written += folder.iterdir()
    for path in written:
        if path.is_fifo() or path.is_socket():
            raise RecipeError(f"{path} is a pipe or a socket, which whoever writes there would wait for; remove it or give another "
                              "run.dir")  # fmt: skip


def free(directory: Path) -> Path:
    """Returns `directory` if it does not exist; else the first of directory-2, directory-3, ... that does not exist."""
    if directory.name in ("", ".."):
        directory = directory.resolve()  # gives it a name
    candidate, number = directory, 1
    while candidate.exists():
        number += 1
        candidate = directory.parent / f"{directory.name}-{number}"
    return candidate

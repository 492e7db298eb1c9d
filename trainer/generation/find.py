"""Finds what a trained model consists of, given its run or one of its checkpoints. Does not import torch."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from bagualu.comm.errors import RecipeError
from bagualu.fault_tolerance.checkpoint.layout.directory import is_checkpoint, latest
from bagualu.fault_tolerance.run_directory import MODEL, RunDirectory
from bagualu.trainer.conversion.besides import context_length
from bagualu.trainer.data.config import RANDOM, DataConfig
from bagualu.trainer.models.decoder.lora import LoraConfig
from bagualu.trainer.operators.registry import DEFAULT_VARIANTS
from bagualu.trainer.recipe.compose import compose, load_recipe, parse
from bagualu.trainer.recipe.config import CHOSEN, Recipe, RunConfig, TrainConfig
from bagualu.trainer.recipe.origin import kept_tokenizer
from bagualu.trainer.recipe.override_text import typed

LAYOUT_KEYS = (
    *(f"parallel.{axis}" for axis in ("tensor", "pipeline", "expert", "data")),
    "train.dtype",
    *(f"comm.{key}" for key in ("backend", "device", "timeout_seconds")),
    *(f"operators.{name}" for name in DEFAULT_VARIANTS),
    *(f"launch.{key}" for key in ("threads", "affinity", "allocator", "port")),
)
"""The keys of a recipe that change how a trained model is computed, and not which model it is."""


@dataclass(frozen=True)
class TrainedModel:
    """A checkpoint, and what its run says about it."""

    recipe: Recipe
    """The recipe of the run."""
    run_dir: Path
    checkpoint: Path
    tokenizer: Path | None
    """The file of the tokenizer; None if the run keeps none."""
    context: int
    """The number of positions that the model knows."""


def find_model(given: Path) -> TrainedModel:
    """Returns the model in the newest checkpoint of the run directory `given`, or in the checkpoint `given`. Raises RecipeError if
    there is none."""
    if not given.exists():
        raise RecipeError(f"{given} does not exist; give the directory of a run, or one of its checkpoints")
    run = RunDirectory(given.resolve().parents[1] if is_checkpoint(given) else given)
    checkpoint = given if is_checkpoint(given) else latest(run.checkpoints)
    if checkpoint is None and not run.config.exists() and (given / MODEL).is_file():
        to = f"runs/{given.resolve().name}"
        raise RecipeError(f"{given} is a model of Hugging Face; give a run that begins with it, which `bagualu checkpoint import "
                          f"{typed(str(given))} to={typed(to)}` makes")  # fmt: skip
    if checkpoint is None and not run.config.exists():
        raise RecipeError(f"{given} is neither a run nor a checkpoint; give the directory of a run, e.g. runs/tiny")
    if checkpoint is None:
        raise RecipeError(f"{given} has no checkpoint yet; one is saved every checkpoint.every steps, when the run ends, and when "
                          "Ctrl-C stops it")  # fmt: skip
    if not run.config.exists():
        raise RecipeError(f"{checkpoint} is not in a run: {run.config} is missing, which describes its model; put it back")
    files = (run.tokenizer, run.hugging_face / run.tokenizer.name)
    tokenizer = next((file for file in files if file.exists()), None)
    recipe = load_recipe(run.config)
    recipe.data.tokenizer = kept_tokenizer(run, recipe.data.tokenizer)
    return TrainedModel(recipe, run.path.resolve(), checkpoint, tokenizer, context_length(run, recipe.data.sequence_length))


def compose_layout(
    verb: str, trained: TrainedModel, overrides: Sequence[str], folder: str, several: str, data_keys: Sequence[str] = ()
) -> Recipe:
    """Returns a recipe with the run's model, factors merged into its weights, the run's dtype and the layout that `overrides` give,
    by default one process. `folder` takes the place of the run's directory. With `data_keys`, keys of its data that may be given
    too, it also has the run's data. Raises RecipeError, also for a key that changes nothing here."""
    then, known = trained.recipe, (*data_keys, *LAYOUT_KEYS)
    data = then.data if data_keys else DataConfig(source=RANDOM, sequence_length=then.data.sequence_length)
    model = replace(then.model, origin=None, lora=LoraConfig())
    base = Recipe(
        run=RunConfig(name=then.run.name, dir=folder, seed=then.run.seed), model=model, data=data,
        train=TrainConfig(dtype=then.train.dtype, micro_batch=then.train.micro_batch, compile=False),
    )  # fmt: skip
    recipe = compose(overrides, several, base)
    for override in parse(overrides):
        if override.key_or_group not in known:
            fixed = "is that of the run" if override.key_or_group.startswith("model") else "changes nothing here"
            raise RecipeError(f"{override.key_or_group} {fixed}; `bagualu {verb}` takes {', '.join(known)}")
    recipe.parallel.validate()
    recipe.train.validate()
    if recipe.train.micro_batch == CHOSEN:
        raise RecipeError(f"train.micro_batch={CHOSEN} is for training; give a number of sequences, or leave it out")
    given = {override.key_or_group.removeprefix("data.") for override in parse(overrides)}
    blends = bool(then.data.blend) and "source" not in given
    same = blends or (recipe.data.source == then.data.source and not then.data.blend)
    own = recipe.data if same else recipe.data.of_other_source(given)
    data = replace(own, global_batch=recipe.world_size() * recipe.train.micro_batch)  # which data ranks divide
    return replace(recipe, data=data, restart=replace(recipe.restart, limit=0))

"""What a checkpoint of a run holds besides tensors, and the checks before a run goes on from one.

The learning rate, the order of the data and every random number are functions of (recipe, seed, step), so the step, the seed and
the fingerprint of the data are their whole state; there is no generator whose position could be lost.
"""

from dataclasses import asdict
from pathlib import Path
from typing import Any

from bagualu.comm.errors import RecipeError
from bagualu.fault_tolerance.checkpoint.load import Checkpoint
from bagualu.fault_tolerance.checkpoint.save import save
from bagualu.trainer.assemble import Parts

CHECKPOINTS = "checkpoints"
_FINGERPRINT = "data fingerprint"


def save_state(parts: Parts, step: int) -> Path:
    """Save the state after `step` steps under the run directory. Collective. Raises CheckpointError."""
    recipe = parts.recipe
    metadata = {
        "step": step,
        "updates": parts.updates,
        "scaler": {"scale": parts.scaler.scale, "good_steps": parts.scaler.good_steps},
        "guard": parts.guard.memory.as_json(),
        "layout": {axis: parts.mesh.layout.size(axis) for axis in ("data", "tensor", "pipeline", "expert", "context")},
        "dtype": recipe.train.dtype,
        "identity": identity(parts),
    }
    root = Path(recipe.run.dir) / CHECKPOINTS
    return save(root, step, parts.optimizer.pieces(), metadata, parts.mesh.group("world"), recipe.checkpoint.keep, parts.device)


def load_state(parts: Parts, path: Path) -> int:
    """Take the state from a checkpoint that any layout wrote; returns the steps done.

    Raises RecipeError when it belongs to another model or other data, before anything is changed; CheckpointError when damaged.
    """
    checkpoint = Checkpoint(path)
    metadata = checkpoint.metadata
    _check_identity(metadata["identity"], identity(parts), path)
    _check_dtype(metadata["dtype"], parts.recipe.train.dtype, path)
    parts.updates = metadata["updates"]
    parts.optimizer.load(checkpoint, parts.updates)
    if parts.scaler.enabled and metadata["dtype"] == parts.recipe.train.dtype:
        parts.scaler.scale = metadata["scaler"]["scale"]
        parts.scaler.good_steps = metadata["scaler"]["good_steps"]
    step = int(metadata["step"])
    parts.guard.load(metadata["guard"], step)
    return step


def identity(parts: Parts) -> dict[str, Any]:
    """What must be the same for a run to go on as the same run, by recipe key."""
    recipe = parts.recipe
    model = {f"model.{key}": value for key, value in asdict(recipe.model).items() if key != "moe"}
    model |= {f"model.moe.{key}": value for key, value in asdict(recipe.model.moe).items()}
    data = {"data.sequence_length": recipe.data.sequence_length, "data.global_batch": recipe.data.global_batch}
    return model | data | {"run.seed": recipe.run.seed, "data.source": recipe.data.source, _FINGERPRINT: parts.corpus.fingerprint}


def _check_identity(saved: dict[str, Any], here: dict[str, Any], path: Path) -> None:
    # The fingerprint last: when the vocabulary differs, the tokens do too, and the vocabulary is what to say.
    for key in sorted(saved.keys() | here.keys(), key=lambda key: (key == _FINGERPRINT, key)):
        if saved.get(key) != here.get(key):
            fix = f"give {key}={saved.get(key)} to go on with it"
            if key == _FINGERPRINT:
                fix = f"put the text of data.source={here['data.source']} back as it was to go on with it"
            raise RecipeError(
                f"{path} was saved with {key}={saved.get(key)} but the recipe has {here.get(key)}; "
                f"{fix}, or another run.dir to start anew"
            )


def _check_dtype(saved: str, here: str, path: Path) -> None:
    """The master weights of the other three are float32, so those may take over from each other."""
    if (saved == "float64") != (here == "float64"):
        raise RecipeError(f"{path} was saved with train.dtype={saved} but the recipe has {here}; "
                          f"give train.dtype={saved} to go on with it, or another run.dir to start anew")  # fmt: skip

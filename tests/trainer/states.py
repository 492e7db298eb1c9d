"""A run's state saved and loaded by itself, where a run does it through `trainer.checkpoints` and `trainer.resume`."""

from pathlib import Path

from bagualu.fault_tolerance.checkpoint.reading.load import Checkpoint
from bagualu.fault_tolerance.checkpoint.saving.save import save
from bagualu.trainer.assemble import Parts
from bagualu.trainer.recovery.state import checkpoints_of, metadata_of, take_state


def save_state(parts: Parts, step: int) -> Path:
    """Save the state after `step` steps under the run directory. Collective. Raises CheckpointError."""
    root, keep = checkpoints_of(parts), parts.recipe.checkpoint.keep
    return save(root, step, parts.engine.pieces(), metadata_of(parts, step), parts.mesh.group("world"), keep)


def load_state(parts: Parts, path: Path) -> int:
    """`take_state` from the checkpoint at `path`."""
    return take_state(parts, lambda: Checkpoint(path))

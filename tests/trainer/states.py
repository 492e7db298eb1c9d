"""A run's state saved and loaded by itself, where a run does it through `trainer.checkpoints` and `trainer.resume`."""

from pathlib import Path

from bagualu.fault_tolerance.checkpoint.reading.load import Checkpoint
from bagualu.fault_tolerance.checkpoint.saving.save import save
from bagualu.trainer.assemble import TrainerState
from bagualu.trainer.recovery.state import checkpoints_of, metadata_of, take_state


def save_state(state: TrainerState, step: int) -> Path:
    """Save the state after `step` steps under the run directory. Collective. Raises CheckpointError."""
    root, keep = checkpoints_of(state), state.recipe.checkpoint.keep
    return save(root, step, state.engine.pieces(), metadata_of(state, step), state.mesh.group("world"), keep)


def load_state(state: TrainerState, path: Path) -> int:
    """`take_state` from the checkpoint at `path`."""
    return take_state(state, lambda: Checkpoint(path))

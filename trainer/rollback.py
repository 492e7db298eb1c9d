"""Going back to a checkpoint within the running processes, and leaving out the samples that led away from it."""

from copy import deepcopy
from pathlib import Path

from bagualu.fault_tolerance.checkpoint.directory import discard, list_checkpoints
from bagualu.fault_tolerance.checkpoint.exchange import broadcast_json
from bagualu.fault_tolerance.checkpoint.format import step_of
from bagualu.fault_tolerance.guard.verdict import DISAGREEMENTS, Verdict
from bagualu.trainer.assemble import Parts
from bagualu.trainer.outcome import GuardError
from bagualu.trainer.resume import Stored, choose
from bagualu.trainer.state import checkpoints_of


def roll_back(parts: Parts, step: int, verdict: Verdict) -> tuple[int, Path]:
    """Load a checkpoint from before step `step` (from 1), which `verdict` takes back. Steps done now, and the checkpoint.

    Where the samples are to blame, those of the last `guard.rollback_window` steps are left out from now on. Checkpoints of later
    steps are removed: the run will come there by another way. Collective. Raises GuardError when there is nothing to go back to,
    CheckpointError when nothing of it is whole.
    """
    world = parts.mesh.group("world")
    root = checkpoints_of(parts)
    by_data = verdict.cause not in DISAGREEMENTS
    window = parts.recipe.guard.rollback_window
    at_most = step - window if by_data else parts.guard.clean
    names: list[str] = broadcast_json(_candidates(root, at_most) if world.rank == 0 else None, world, parts.device)
    if not names:
        raise GuardError(f"{verdict.text}; there is no checkpoint to go back to; give a smaller checkpoint.every")
    memory = deepcopy(parts.guard.memory)
    chosen, _ = choose(parts, [Stored(root / name) for name in names])
    done = chosen.step
    parts.guard.memory.keep(memory)
    if by_data:
        parts.guard.memory.leave_out(max(done + 1, step - window + 1), step, str(verdict.cause))
    if world.rank == 0:
        for later in list_checkpoints(root):
            if (step_of(later) or 0) > done:
                discard(later)
    world.barrier()
    return done, root / chosen.name


def _candidates(root: Path, at_most: int) -> list[str]:
    """Checkpoints of at most `at_most` steps, newest first; if there is none so old, the oldest."""
    checkpoints = list_checkpoints(root)
    old_enough = [path for path in checkpoints if (step_of(path) or 0) <= at_most]
    return [path.name for path in reversed(old_enough or checkpoints[:1])]

"""Goes back to a checkpoint without restarting the processes, and skips the samples if they made this necessary."""

from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

from bagualu.comm.agree import meet
from bagualu.comm.objects import broadcast_json
from bagualu.fault_tolerance.checkpoint.layout.directory import discard, list_checkpoints
from bagualu.fault_tolerance.checkpoint.layout.format import step_of
from bagualu.fault_tolerance.guard.verdict import DISAGREEMENTS, Cause, GuardDecision
from bagualu.trainer.assemble import TrainerState
from bagualu.trainer.process.failure import GuardError
from bagualu.trainer.recovery.resume import Resumed, Stored, choose, list_stored, report_damaged
from bagualu.trainer.recovery.state import checkpoints_of


def roll_back(state: TrainerState, step: int, verdict: GuardDecision, stop: Callable[[], bool]) -> Resumed:
    """Loads a checkpoint from before step `step` (from 1), which `verdict` undoes; returns where the run resumes.

    If the samples are at fault, those of the last `guard.rollback_window` steps up to `step` are skipped from now on. Checkpoints
    of steps after the loaded one are removed, because the run will reach these steps with another state. A damaged checkpoint is
    set aside, as at a start. Collective.

    Raises GuardError if there is no checkpoint to go back to, CheckpointError if all candidates are damaged or cannot be read now.
    """
    world = state.mesh.group("world")
    root = checkpoints_of(state)
    by_data = verdict.cause not in (*DISAGREEMENTS, Cause.UPDATE)
    window = state.recipe.guard.rollback_window
    at_most = step - window if by_data else state.guard.clean
    if verdict.cause is Cause.UPDATE:  # checkpoints of earlier steps hold finite values
        at_most = step - 1
    stored = list_stored(state, stop)
    listed: Any = broadcast_json(_candidates(stored, at_most, by_data), world)
    candidates = [Stored(root / name) for name in listed["names"]]
    if not candidates:
        why = _nothing_to_go_back_to(listed["later"], at_most, verdict.cause is Cause.UPDATE)
        raise GuardError(f"{verdict.text}; {why}")
    memory = deepcopy(state.guard.memory)
    chosen, problems = choose(state, candidates, stop)
    done, damaged = chosen.step, report_damaged(state, candidates, problems, chosen)
    state.guard.memory.keep(memory)
    if by_data:
        state.guard.memory.leave_out(max(done + 1, step - window + 1), step, str(verdict.cause))
    if world.rank == 0:
        for later in list_checkpoints(root):
            if (step_of(later) or 0) > done and later.name not in problems:
                discard(later)
    meet(world)
    return Resumed(done, root / chosen.name, chosen.name, damaged)


def _candidates(checkpoints: list[Path], at_most: int, by_data: bool) -> dict[str, Any]:
    """Returns a dictionary: `names`, the checkpoints of at most `at_most` steps, newest first, and `later`, whether there are
    others.

    If none is old enough, `names` has the oldest if the samples are at fault (`by_data`), but not if memory is, since that
    checkpoint may hold the damage.
    """
    old_enough = [path for path in checkpoints if (step_of(path) or 0) <= at_most]
    if by_data and not old_enough:
        old_enough = checkpoints[:1]
    return {"names": [path.name for path in reversed(old_enough)], "later": len(old_enough) < len(checkpoints)}


def _nothing_to_go_back_to(later: bool, clean: int, by_update: bool) -> str:
    if not later and by_update:
        return "there is no checkpoint to go back to; lower optim.lr or raise optim.epsilon, and start anew"
    if not later:
        return "there is no checkpoint to go back to; give a smaller checkpoint.every"
    return (f"every checkpoint is of later than step {clean}, up to which the state is known to have been whole, and may hold the "
            "damage; raise checkpoint.keep or lower guard.check_every, and start anew")  # fmt: skip

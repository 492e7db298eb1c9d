"""The guard's one-line messages about a step."""

from collections.abc import Sequence

from bagualu.fault_tolerance.guard.verdict import Cause, GuardAction

_ADVICE = {
    Cause.NONFINITE: "lower optim.lr or raise optim.warmup_steps",
    Cause.NORM: "lower optim.lr or raise guard.spike_factor",
    Cause.LOSS: "look at the data, or raise guard.loss_spike_factor",
}
_REPLACE = "replace that hardware"


def finding(cause: Cause, loss: float, norm: float, damaged: Sequence[str]) -> str:
    """Returns the part of the message that says what is wrong: the names in `damaged` if there are any, else the loss and the
    gradient norm (for GRADIENTS, only the cause)."""
    if damaged:
        return f"{cause}: {'; '.join(damaged)}"
    return str(cause) if cause is Cause.GRADIENTS else f"{cause}: loss {loss:g}, gradient norm {norm:g}"


def diagnosis(cause: Cause, ranks: Sequence[int], same: bool | None) -> str:
    """Returns the part of the message that says whether the hardware, or the data and code, is the cause; "" if repeated attempts
    show neither.

    `ranks` are those whose attempts differ. `same` says whether the newest attempt gave the same bits as an earlier attempt; None
    if that is unknown.
    """
    if cause in (Cause.STATE, Cause.WEIGHTS):
        return ""
    if ranks:
        return f"computed again it gave other bits on {_ranks(ranks)}: the cause is the hardware, not the data or the code"
    return "computed again it gave the same bits: the cause is the data or the code, not the hardware" if same else ""


def ending(cause: Cause, action: GuardAction, ranks: Sequence[int], setbacks: int, step: int) -> str:
    """Returns the part of the message that says what is done about `step` (counted from 1) and, if the run ends, what the user can
    do."""
    if action is not GuardAction.STOP:
        return {GuardAction.COMMIT: "the step was applied", GuardAction.SKIP: "the step was left out",
                GuardAction.ROLLBACK: "back to a checkpoint"}.get(action, "once more")  # fmt: skip
    advice = _REPLACE if ranks else _ADVICE.get(cause, _REPLACE)
    if setbacks and not ranks:
        advice = f"so were {setbacks} steps before it, so single samples are not the cause; {advice}"
    elif advice is not _REPLACE:
        advice += f", or leave its samples out with guard.leave_out=[{step}]"
    return f"the step was discarded on every rank; {advice}, and go on from the last checkpoint with checkpoint.resume=true"


def after_update(step: int, action: GuardAction, damaged: Sequence[str], again: bool) -> str:
    """Returns the message about `step` (counted from 1), whose update left non-finite values in the tensors named in `damaged`."""
    ends = {
        GuardAction.COMMIT: "the same state is finite on another rank: it was copied from there, and the step was applied",
        GuardAction.ROLLBACK: "the update has overwritten the previous state, so the run goes back to a checkpoint",
        GuardAction.STOP: f"{'this is not the first time; ' if again else ''}nothing of the step is saved; lower optim.lr or raise "
        "optim.epsilon, and go on from the last checkpoint with checkpoint.resume=true",
    }
    return f"step {step}: {Cause.UPDATE}: {'; '.join(damaged)}; {ends[action]}"


def by_rank(rank: int, names: Sequence[str]) -> str:
    """Returns a text with the rank and the names of what is damaged there: the first three of `names` and the number of others."""
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return f"rank {rank}: {', '.join(names[:3])}{more}"


def _ranks(ranks: Sequence[int]) -> str:
    named = ", ".join(map(str, ranks[:8])) + (f" and {len(ranks) - 8} more" if len(ranks) > 8 else "")
    return f"rank{'s' if len(ranks) > 1 else ''} {named}"

"""What the guard says about a step, in one line. Free of torch."""

from collections.abc import Sequence

from bagualu.fault_tolerance.guard.verdict import Cause, GuardAction

_ADVICE = {
    Cause.NONFINITE: "lower optim.lr or raise optim.warmup_steps",
    Cause.NORM: "lower optim.lr or raise guard.spike_factor",
    Cause.LOSS: "look at the data, or raise guard.loss_spike_factor",
}
_REPLACE = "replace that hardware"


def finding(cause: Cause, loss: float, norm: float, damaged: Sequence[str]) -> str:
    """What is wrong: the figures, or the `damaged` things by name."""
    if damaged:
        return f"{cause}: {'; '.join(damaged)}"
    return str(cause) if cause is Cause.GRADIENTS else f"{cause}: loss {loss:g}, gradient norm {norm:g}"


def diagnosis(cause: Cause, ranks: Sequence[int], same: bool | None) -> str:
    """What attempts that were compared tell about where the fault lies; "" when they tell nothing."""
    if cause in (Cause.STATE, Cause.WEIGHTS):
        return ""
    if ranks:
        return f"computed again it gave other bits on {_ranks(ranks)}: the hardware, not the data or the code"
    return "computed again it gave the same bits: the data or the code, not the hardware" if same else ""


def ending(cause: Cause, action: GuardAction, ranks: Sequence[int], setbacks: int, step: int) -> str:
    """What is done about `step` (from 1); for the end of a run with what a person can do."""
    if action is not GuardAction.STOP:
        return {GuardAction.COMMIT: "the step was applied", GuardAction.SKIP: "the step was left out",
                GuardAction.ROLLBACK: "back to a checkpoint"}.get(action, "once more")  # fmt: skip
    advice = _REPLACE if ranks else _ADVICE.get(cause, _REPLACE)
    if setbacks and not ranks:
        advice = f"with {setbacks} steps before it likewise, so it is not single samples; {advice}"
    elif advice is not _REPLACE:
        advice += f", or leave its samples out with guard.leave_out=[{step}]"
    return f"the step was discarded on every rank; {advice}, and go on from the last checkpoint with checkpoint.resume=true"


def after_update(step: int, action: GuardAction, damaged: Sequence[str], again: bool) -> str:
    """What is said of `step` (from 1), whose update left values that are not finite where `damaged` says."""
    ends = {
        GuardAction.COMMIT: "another rank holds the same state, finite: it was copied from there, and the step was applied",
        GuardAction.ROLLBACK: "the update has overwritten the state from before, which a checkpoint must give back",
        GuardAction.STOP: f"{'this is not the first time; ' if again else ''}nothing of the step is saved; lower optim.lr or raise "
        "optim.epsilon, and go on from the last checkpoint with checkpoint.resume=true",
    }
    return f"step {step}: {Cause.UPDATE}: {'; '.join(damaged)}; {ends[action]}"


def by_rank(rank: int, things: Sequence[str]) -> str:
    """What is damaged on a rank; the first few."""
    more = f" and {len(things) - 3} more" if len(things) > 3 else ""
    return f"rank {rank}: {', '.join(things[:3])}{more}"


def _ranks(ranks: Sequence[int]) -> str:
    named = ", ".join(map(str, ranks[:8])) + (f" and {len(ranks) - 8} more" if len(ranks) > 8 else "")
    return f"rank{'s' if len(ranks) > 1 else ''} {named}"

"""From what is wrong with a step to what is done about it: a pure function of figures that all ranks hold alike. Free of torch.

The policy `retry` is a ladder. The step is computed again. Fine this time: it was the hardware, and the step is applied. The same
bits once more: it is the data or the code, and the step is skipped (its samples deferred, if it was a spike), `guard.limit` times
in a row at most. If other samples then go well it was the data; if not, the code or the settings, and the run ends.
"""

from dataclasses import dataclass

from bagualu.fault_tolerance.config import GuardConfig
from bagualu.fault_tolerance.guard.verdict import SPIKES, Cause, GuardAction

MOST_ATTEMPTS = 4
"""More than any single fault needs: the faulty attempt, one that shows the fault, one that confirms the good one."""


@dataclass(frozen=True)
class Situation:
    cause: Cause | None
    """What is wrong with the newest attempt."""
    attempts: int
    same: bool | None
    """Whether it gave, on every rank, the bits of an earlier one; None when that is not known."""
    repairable: bool = True
    """Whether damaged state can be had from another rank."""
    setbacks: int = 0
    """Steps left out or taken back in a row before this one."""


def decide(config: GuardConfig, now: Situation) -> GuardAction:
    """What to do after an attempt."""
    if now.cause is None:
        return GuardAction.COMMIT
    if now.cause is Cause.OVERFLOW:
        return GuardAction.SKIP
    action = GuardAction(policy(config, now.cause))
    if action is GuardAction.RETRY:
        action = _next_rung(now)
    if action in (GuardAction.SKIP, GuardAction.ROLLBACK) and now.setbacks >= config.limit:
        return GuardAction.STOP
    return action


def policy(config: GuardConfig, cause: Cause) -> str:
    """What the recipe says about a cause."""
    if cause is Cause.NONFINITE:
        return config.on_nonfinite
    return config.on_spike if cause in SPIKES else config.on_disagreement


def _next_rung(now: Situation) -> GuardAction:
    if now.cause in (Cause.WEIGHTS, Cause.STATE):
        return GuardAction.RETRY if now.repairable and now.attempts < MOST_ATTEMPTS else GuardAction.ROLLBACK
    if now.cause is Cause.GRADIENTS:
        return GuardAction.RETRY if now.attempts < MOST_ATTEMPTS else GuardAction.STOP
    if now.same or (now.same is None and now.attempts > 1):
        return GuardAction.SKIP
    return GuardAction.RETRY if now.attempts < MOST_ATTEMPTS else GuardAction.STOP

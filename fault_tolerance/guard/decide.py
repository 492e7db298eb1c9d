"""Decides what to do about a step in which something is wrong: a pure function of values that are the same on all ranks.

The policy `retry` has several stages. First the step is computed again. If it is fine this time, the hardware was at fault, and
the step is applied. If it gives the same bits, the data or the code is at fault, and the step is skipped (after a spike, its
samples are deferred). After `guard.limit` skipped steps in a row, the code or the settings must be at fault, and the run ends.
"""

from dataclasses import dataclass

from bagualu.fault_tolerance.config import GuardConfig
from bagualu.fault_tolerance.guard.verdict import SPIKES, Cause, GuardAction

MOST_ATTEMPTS = 4
"""The most attempts at a step, one more than a single fault needs: the faulty attempt, one that reveals the fault, and one that
confirms the good result."""


@dataclass(frozen=True)
class Situation:
    """What the guard knows after an attempt at a step; the same on every rank."""

    cause: Cause | None
    """What is wrong with the newest attempt at the step; None if nothing is wrong."""
    attempts: int
    """How often the step has been computed so far, including the newest attempt."""
    same: bool | None
    """Whether the newest attempt gave the same bits as an earlier attempt on every rank; None if that is not known."""
    repairable: bool = True
    """Whether every damaged piece of state has an intact copy on another rank; true if nothing is damaged."""
    setbacks: int = 0
    """Number of steps in a row before this step that were left out, deferred or rolled back."""


def decide(config: GuardConfig, now: Situation) -> GuardAction:
    """Returns what to do about the step after the attempt that `now` describes."""
    if now.cause is None:
        return GuardAction.COMMIT
    if now.cause is Cause.OVERFLOW:
        return GuardAction.SKIP
    action = GuardAction(policy(config, now.cause))
    if action is GuardAction.RETRY:
        action = _after_attempt(now)
    if action in (GuardAction.SKIP, GuardAction.ROLLBACK) and now.setbacks >= config.limit:
        return GuardAction.STOP
    return action


def policy(config: GuardConfig, cause: Cause) -> str:
    """Returns the recipe's policy for a cause: guard.on_nonfinite, guard.on_spike or, for every other cause,
    guard.on_disagreement."""
    if cause is Cause.NONFINITE:
        return config.on_nonfinite
    return config.on_spike if cause in SPIKES else config.on_disagreement


def _after_attempt(now: Situation) -> GuardAction:
    if now.cause in (Cause.WEIGHTS, Cause.STATE):
        return GuardAction.RETRY if now.repairable and now.attempts < MOST_ATTEMPTS else GuardAction.ROLLBACK
    if now.cause is Cause.GRADIENTS:
        return GuardAction.RETRY if now.attempts < MOST_ATTEMPTS else GuardAction.STOP
    if now.same or (now.same is None and now.attempts > 1):
        return GuardAction.SKIP
    return GuardAction.RETRY if now.attempts < MOST_ATTEMPTS else GuardAction.STOP

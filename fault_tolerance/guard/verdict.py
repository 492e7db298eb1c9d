"""What can be wrong with a step, and what the guard can do about it."""

from dataclasses import dataclass
from enum import StrEnum


class GuardAction(StrEnum):
    COMMIT = "commit"
    """Apply the update on every rank."""
    SKIP = "skip"
    """Make no update; the step's samples are never trained on, or later if they are deferred (`GuardDecision.deferred`)."""
    RETRY = "retry"
    """Compute the step again from the same weights and samples."""
    ROLLBACK = "rollback"
    """Go back to a checkpoint."""
    STOP = "stop"
    """End the run."""


class Cause(StrEnum):
    OVERFLOW = "float16 overflow"
    NONFINITE = "loss or gradient not finite"
    NORM = "gradient norm spike"
    LOSS = "loss spike"
    UPDATE = "weights or moments not finite after the update"
    GRADIENTS = "gradients differ when computed again"
    WEIGHTS = "weights of a replica damaged"
    STATE = "optimizer state damaged"
    DIVERGED = "weights diverged"
    """Samples that were trained on before give a spike too when computed again, so the weights are wrong."""


SPIKES = (Cause.NORM, Cause.LOSS)
DISAGREEMENTS = (Cause.GRADIENTS, Cause.WEIGHTS, Cause.STATE, Cause.DIVERGED)
"""Causes that are not in the samples: hardware faults and diverged weights."""


@dataclass(frozen=True)
class GuardDecision:
    """The decision about one step; the same on every rank."""

    action: GuardAction
    cause: Cause | None = None
    """What was wrong with the step, even if the step was committed in the end; None if nothing was wrong."""
    ranks: tuple[int, ...] = ()
    """The ranks at fault; empty if they are not known."""
    attempts: int = 1
    """How often the step was computed, including the first time."""
    deferred: bool = False
    """Whether the samples of a skipped step are trained on later."""
    text: str = ""
    """The message for users: what was wrong, on which ranks, the cause and what is done; "" if there is nothing to report."""

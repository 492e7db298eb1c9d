"""What can be wrong with a step, and what is done about it. Free of torch."""

from dataclasses import dataclass
from enum import StrEnum


class GuardAction(StrEnum):
    COMMIT = "commit"
    """The update happens, on every rank."""
    SKIP = "skip"
    """No update; the step's samples count as used, or are deferred (`GuardDecision.deferred`)."""
    RETRY = "retry"
    """The step once more, from the same weights and samples."""
    ROLLBACK = "rollback"
    """Back to a checkpoint."""
    STOP = "stop"
    """The run ends."""


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
    """Samples that the run has learnt look wrong too."""


SPIKES = (Cause.NORM, Cause.LOSS)
DISAGREEMENTS = (Cause.GRADIENTS, Cause.WEIGHTS, Cause.STATE, Cause.DIVERGED)
"""The samples are not to blame."""


@dataclass(frozen=True)
class GuardDecision:
    """About one step, the same on every rank."""

    action: GuardAction
    cause: Cause | None = None
    """What was wrong, also where the step was committed in the end."""
    ranks: tuple[int, ...] = ()
    """Those at fault, where that could be told."""
    attempts: int = 1
    """How often the step was computed."""
    deferred: bool = False
    """Of SKIP: the samples are learnt from later."""
    text: str = ""
    """In words: what was wrong, who, and what it means."""

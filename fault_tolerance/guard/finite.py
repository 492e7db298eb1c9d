"""Whether tensors hold only finite values, at the cost of reading them once, and what follows where an update left others."""

import torch

from bagualu.fault_tolerance.config import GuardConfig
from bagualu.fault_tolerance.guard.verdict import GuardAction


def probe(values: torch.Tensor) -> torch.Tensor:
    """A scalar that is not finite when any of `values` is not; it may also overflow where all of them are finite."""
    # float16 has no room for the sum of a hundred thousand ones, but for the root of the sum of their squares.
    return torch.linalg.vector_norm(values) if values.dtype == torch.float16 else values.sum()


def is_finite(values: torch.Tensor) -> bool:
    """Whether all of `values` are finite."""
    return bool(torch.isfinite(probe(values))) or bool(torch.isfinite(values).all())


def after_update(config: GuardConfig, repairable: bool, again: bool, setbacks: int) -> GuardAction:
    """What becomes of a step whose update left values that are not finite on some rank.

    `repairable`: other ranks hold the same state, finite: then it was the hardware of the rank that does not, and COMMIT means
    that the step is committed after the repair. Otherwise the state before the step is gone, so it must come from a checkpoint.
    `again`: the run has gone back from this step, or a later one, before: then it is the settings, and the run ends.
    """
    if repairable and config.on_disagreement == "retry":
        return GuardAction.COMMIT
    wanted = config.on_disagreement if repairable else config.on_nonfinite
    return GuardAction.STOP if wanted == "stop" or again or setbacks >= config.limit else GuardAction.ROLLBACK

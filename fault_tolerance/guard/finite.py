"""Tests whether tensors are finite, reading them once, and decides what to do when an update left non-finite values."""

import torch

from bagualu.fault_tolerance.config import GuardConfig
from bagualu.fault_tolerance.guard.verdict import GuardAction


def probe(values: torch.Tensor) -> torch.Tensor:
    """Returns a scalar that is not finite if any of `values` is not. It may also overflow if all of them are finite."""
    # In float16 the sum of a hundred thousand ones overflows; the root of the sum of their squares does not.
    return torch.linalg.vector_norm(values) if values.dtype == torch.float16 else values.sum()


def is_finite(values: torch.Tensor) -> bool:
    """Returns whether all of `values` are finite."""
    return bool(torch.isfinite(probe(values))) or bool(torch.isfinite(values).all())


def after_update(config: GuardConfig, repairable: bool, again: bool, setbacks: int) -> GuardAction:
    """Returns what to do about a step whose update left non-finite values on some rank.

    `repairable` says that another rank holds the same state with finite values. Then the hardware of the first rank is at fault,
    and COMMIT means that the step is committed after a repair. Otherwise the state before the step is lost and must come from a
    checkpoint. `again` says that the run has already gone back from this step or a later one; then the settings are at fault, and
    the run ends. `setbacks` is the number of steps in a row before this step that were left out, deferred or rolled back.
    """
    if repairable and config.on_disagreement == "retry":
        return GuardAction.COMMIT
    wanted = config.on_disagreement if repairable else config.on_nonfinite
    return GuardAction.STOP if wanted == "stop" or again or setbacks >= config.limit else GuardAction.ROLLBACK

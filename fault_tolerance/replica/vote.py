"""Doing something on every rank, or on none as far as the ranks know."""

from collections.abc import Callable
from typing import ParamSpec, TypeVar

import torch

from bagualu.comm.group import Group
from bagualu.fault_tolerance.checkpoint.exchange import gather_json
from bagualu.fault_tolerance.checkpoint.format import CheckpointError

P = ParamSpec("P")
T = TypeVar("T")


def together(group: Group, device: torch.device, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """What `function` returns here, once it has succeeded on all ranks. Collective.

    Raises CheckpointError on every rank when it raised OSError, ValueError or CheckpointError on any, in the words of the first.
    """
    result: T
    error = None
    try:
        result = function(*args, **kwargs)
    except (OSError, ValueError, CheckpointError) as caught:
        kind = "" if isinstance(caught, CheckpointError) else f"{type(caught).__name__}: "
        error = f"{kind}{caught}".replace("\n", " ")
    failed = torch.tensor(float(error is not None), device=device)
    group.all_reduce(failed, "max")
    if failed.item():
        errors = gather_json(error, group, device)
        rank, first = next((rank, text) for rank, text in zip(group.ranks, errors, strict=True) if text)
        raise CheckpointError(f"rank {rank}: {first}")
    return result

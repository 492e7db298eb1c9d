"""Makes all ranks succeed or fail together."""

from collections.abc import Callable
from typing import TypeVar

import torch

from bagualu.comm.errors import CommunicationError, RecipeError
from bagualu.comm.group import Group
from bagualu.fault_tolerance.checkpoint.exchange import gather_json
from bagualu.fault_tolerance.checkpoint.layout.format import CheckpointError, CheckpointStorageError

T = TypeVar("T")
_KINDS = {"recipe": RecipeError, "storage": CheckpointStorageError}


def on_all(function: Callable[[], T], group: Group, device: torch.device) -> T:
    """Returns `function()` if no rank raises. Collective; `function` may be collective too.

    Otherwise raises the same one-line error on every rank: RecipeError if any rank raised it (without the rank, since every rank
    would refuse the recipe), else CheckpointError with the first rank and the number of others. If all errors are of storage that
    does not work at the moment, it is CheckpointStorageError.
    """
    result: list[T] = []
    own: list[str] | None = None
    try:
        result.append(function())
    except CommunicationError:  # the ranks can no longer agree
        raise
    except Exception as error:
        text = str(error).replace("\n", " ")
        known = isinstance(error, RecipeError | CheckpointError)
        kind = next((kind for kind, error_class in _KINDS.items() if isinstance(error, error_class)), "other")
        own = [kind, text if known else f"{type(error).__name__}: {text}"]
    failed = torch.tensor(int(own is not None), device=device)
    group.all_reduce(failed, "max")
    if not failed.item():
        return result[0]
    problems = [(rank, problem) for rank, problem in zip(group.ranks, gather_json(own, group, device), strict=True) if problem]
    for _, (kind, text) in problems:
        if kind == "recipe":
            raise RecipeError(text)
    others = [problem for problem in problems if problem[1][0] == "other"]
    rank, (_, text) = (others or problems)[0]
    more = f" (and {len(problems) - 1} more ranks)" if len(problems) > 1 else ""
    raise (CheckpointError if others else CheckpointStorageError)(f"rank {rank}{more}: {text}")

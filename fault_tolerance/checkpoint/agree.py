"""One verdict on all ranks: what one of them cannot do, none of them does."""

from collections.abc import Callable
from typing import TypeVar

import torch

from bagualu.comm.errors import CommunicationError, RecipeError
from bagualu.comm.group import Group
from bagualu.fault_tolerance.checkpoint.exchange import gather_json
from bagualu.fault_tolerance.checkpoint.format import CheckpointError, CheckpointStorageError

T = TypeVar("T")
_KINDS = {"recipe": RecipeError, "storage": CheckpointStorageError}


def on_all(function: Callable[[], T], group: Group, device: torch.device) -> T:
    """`function()`, if it raises nothing on any rank. Collective; `function` itself may be too.

    Else the same error on every rank, in one line: RecipeError if any rank raised one (without the rank: it would be refused
    everywhere), else CheckpointError that names the first rank and how many more; where all that is wrong is storage that cannot be
    read or written now, CheckpointStorageError.
    """
    result: list[T] = []
    own: list[str] | None = None
    try:
        result.append(function())
    except CommunicationError:  # there is nobody left to agree with
        raise
    except Exception as error:
        text = str(error).replace("\n", " ")
        known = isinstance(error, RecipeError | CheckpointError)
        kind = next((kind for kind, one in _KINDS.items() if isinstance(error, one)), "other")
        own = [kind, text if known else f"{type(error).__name__}: {text}"]
    failed = torch.tensor(int(own is not None), device=device)
    group.all_reduce(failed, "max")
    if not failed.item():
        return result[0]
    problems = [(rank, said) for rank, said in zip(group.ranks, gather_json(own, group, device), strict=True) if said]
    for _, (kind, text) in problems:
        if kind == "recipe":
            raise RecipeError(text)
    others = [problem for problem in problems if problem[1][0] == "other"]
    rank, (_, text) = (others or problems)[0]
    more = f" (and {len(problems) - 1} more ranks)" if len(problems) > 1 else ""
    raise (CheckpointError if others else CheckpointStorageError)(f"rank {rank}{more}: {text}")

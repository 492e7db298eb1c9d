"""Agreement between ranks: a function that fails on any rank of a group counts as failed on all of them."""

import hashlib
import json
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch

from bagualu.comm.errors import CommunicationError, RecipeError
from bagualu.comm.group import Group
from bagualu.comm.objects import gather_json

T = TypeVar("T")


class RankError(RuntimeError):
    """A function that all ranks ran has failed on at least one. The message names a rank on which it failed and says on how many
    others it failed."""


def on_all(
    function: Callable[[], T],
    group: Group,
    error: type[Exception] = RankError,
    transient: type[Exception] | None = None,
) -> T:
    """Calls `function` and returns this rank's result if the function raised on no rank. Collective; `function` itself may be too.

    Otherwise every rank raises the same exception, with a message of one line: RecipeError if the function raised a RecipeError on
    any rank (the message names no rank, since every rank would refuse); else `transient`, a subclass of `error` for problems that
    may pass, if every failure is a `transient`; else `error`. If the function raises a CommunicationError, this rank raises it
    immediately and takes part in no agreement, since the ranks can no longer communicate.
    """
    result: list[T] = []
    own: list[str] | None = None
    try:
        result.append(function())
    except CommunicationError:
        raise
    except Exception as problem:
        text = str(problem).replace("\n", " ")
        known = isinstance(problem, RecipeError | error)
        own = [_kind(problem, transient), text if known else f"{type(problem).__name__}: {text}"]
    if not any_rank(own is not None, group):
        return result[0]
    problems = [(rank, *answer) for rank, answer in zip(group.ranks, gather_json(own, group), strict=True) if answer]
    for _, kind, text in problems:
        if kind == "recipe":
            raise RecipeError(text)
    lasting = [problem for problem in problems if problem[1] == "lasting"]
    rank, _, text = (lasting or problems)[0]
    more = f" (and {len(problems) - 1} more ranks)" if len(problems) > 1 else ""
    raised = error if lasting or transient is None else transient
    raise raised(f"rank {rank}{more}: {text}")


def any_rank(value: bool, group: Group) -> bool:
    """Returns whether `value` is true on any rank of the group. Collective."""
    return maximum(float(value), group) > 0


def maximum(value: float, group: Group) -> float:
    """Returns the largest `value` that any rank of the group passes. Collective."""
    return maxima([value], group)[0]


def total(value: float, group: Group) -> float:
    """Returns the sum of every rank's `value`, in float64: exact for whole numbers up to 2**53. Collective."""
    return totals([value], group)[0]


def totals(values: Sequence[float], group: Group) -> list[float]:
    """Returns, for each index of `values`, the sum over all ranks, in float64. Every rank passes equally many values.
    Collective."""
    return _reduced(values, group, "sum")


def maxima(values: Sequence[float], group: Group) -> list[float]:
    """Returns, for each index of `values`, the largest value that any rank passes. Every rank passes equally many values.
    Collective."""
    return _reduced(values, group, "max")


def summed(tensor: torch.Tensor, group: Group) -> torch.Tensor:
    """Returns the sum of every rank's `tensor`, in float64. Collective."""
    values = tensor.double()
    group.all_reduce(values)
    return values


def meet(group: Group) -> None:
    """Waits until every rank of `group` has called this function. Collective."""
    group.barrier()


def first_different(value: Any, group: Group) -> tuple[int, Any, Any] | None:
    """Returns (position, its value, the value of position 0) for the first position whose JSON value differs from that of position
    0.

    Returns None if all ranks have the same value. Collective. The values themselves are gathered only if they differ.
    """
    digest = hashlib.blake2b(_as_text(value).encode(), digest_size=6).digest()  # a float64 holds it exactly
    number = float(int.from_bytes(digest))
    ends = torch.tensor([number, -number], dtype=torch.float64, device=group.device)
    group.all_reduce(ends, "max")
    largest, smallest = group.read(ends)
    if largest == -smallest:
        return None
    values = gather_json(value, group)
    position = next(position for position, other in enumerate(values) if _as_text(other) != _as_text(values[0]))
    return position, values[position], values[0]


def _as_text(value: Any) -> str:
    return json.dumps(value, sort_keys=True)


def gather(value: float, group: Group) -> list[float]:
    """Returns the list of all ranks' `value`s, in order of position, on every rank. Collective."""
    own = torch.tensor([value], dtype=torch.float64, device=group.device)
    values = torch.empty(group.size, dtype=torch.float64, device=group.device)
    group.all_gather(values, own)
    return group.read(values)


def _reduced(values: Sequence[float], group: Group, op: Any) -> list[float]:
    tensor = torch.tensor(values, dtype=torch.float64, device=group.device)
    if values:
        group.all_reduce(tensor, op)
    return group.read(tensor)


def _kind(problem: Exception, transient: type[Exception] | None) -> str:
    if isinstance(problem, RecipeError):
        return "recipe"
    return "transient" if transient is not None and isinstance(problem, transient) else "lasting"

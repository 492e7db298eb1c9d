"""Validates the keys parallel.balance, parallel.speeds, parallel.shares and parallel.memory_bytes."""

from collections.abc import Sequence
from typing import Any

from bagualu.comm.errors import RecipeError
from bagualu.parallel.layout import StagePlacement
from bagualu.parallel.pipeline.split import require_layers, split_layers

COMPUTED = ("measured", "analytic")
"""Values of parallel.balance for which the split of layers into stages is computed from costs."""


def validate_split(balance: Any, layers: int, placement: StagePlacement, memory_bytes: Any, recompute: Any) -> None:
    """Raises RecipeError for settings of the split that are wrong whatever the layers cost: more stages than layers, a list that
    does not add up, or recompute=auto without a memory cap."""
    require_layers(layers, placement)
    if balance not in COMPUTED:
        split_layers(layers, placement, balance)
    if recompute == "auto" and memory_bytes is None:
        raise RecipeError("train.recompute=auto recomputes only what does not fit parallel.memory_bytes, which is left out; give "
                          "parallel.memory_bytes=BYTES, or train.recompute=none or full")  # fmt: skip


def validate_speeds(speeds: Any, ranks: int, balance: Any) -> None:
    """Raises RecipeError unless `speeds` is None, "measured" or a list with a positive number per pipeline rank, and if `speeds` is
    given although `balance` does not compute the split from costs."""
    if speeds is None:
        return
    if balance not in COMPUTED:
        raise RecipeError(f"parallel.speeds={speeds} has no effect with parallel.balance={balance}; "
                          f"give parallel.balance=measured or leave parallel.speeds out")  # fmt: skip
    if speeds == "measured":
        return
    numbers = _numbers(speeds, (int, float))
    if numbers is None or len(numbers) != ranks or not all(0 < speed < float("inf") for speed in numbers):
        near = "[" + ",".join(["1.0"] * ranks) + "]"
        raise RecipeError(f"parallel.speeds={speeds} must be measured or hold a positive number for each of the "
                          f"parallel.pipeline={ranks} ranks, e.g. parallel.speeds={near}")  # fmt: skip


def memory_caps(memory_bytes: Any, ranks: int) -> list[int] | None:
    """Returns the memory cap of each pipeline rank, in bytes; None if there is no limit. Raises RecipeError unless `memory_bytes`
    is None, a positive integer or a list of one per rank."""
    if memory_bytes is None:
        return None
    caps = [memory_bytes] * ranks if type(memory_bytes) is int else _numbers(memory_bytes, (int,))
    if caps is None or len(caps) != ranks or min(caps) < 1:
        raise RecipeError(f"parallel.memory_bytes={memory_bytes} must be a positive number of bytes or a list of {ranks}, a number "
                          f"per pipeline rank; e.g. parallel.memory_bytes={8 * 2**30}, or leave it out")  # fmt: skip
    return caps


def validate_shares(shares: Any, micro_batches: int, data: int, expert: int) -> None:
    """Raises RecipeError unless `shares` is None, "measured" or a list that divides a step's `micro_batches` among `data` ranks, at
    least one each. If it is not None, it also requires `expert` 1 and at least `data` micro-batches."""
    if shares is None:
        return
    if expert > 1:
        raise RecipeError(f"parallel.shares={shares} does not go with parallel.expert={expert}, whose ranks run their experts "
                          "together; leave parallel.shares out or give parallel.expert=1")  # fmt: skip
    even = [micro_batches // data + (rank < micro_batches % data) for rank in range(data)]
    if min(even) < 1:
        raise RecipeError(f"parallel.shares={shares} has {micro_batches} micro-batches for {data} data ranks; give a smaller "
                          f"train.micro_batch, or parallel.data={micro_batches} or less")  # fmt: skip
    if shares == "measured":
        return
    counts = _numbers(shares, (int,))
    if counts is None or len(counts) != data or sum(counts) != micro_batches or min(counts) < 1:
        near = "[" + ",".join(map(str, even)) + "]"
        raise RecipeError(f"parallel.shares={shares} must be measured or hold {data} counts of at least 1 that add up to the "
                          f"{micro_batches} micro-batches of a step, e.g. parallel.shares={near}")  # fmt: skip


def _numbers(value: Any, types: tuple[type, ...]) -> list[Any] | None:
    is_list = isinstance(value, Sequence) and not isinstance(value, str)
    return list(value) if is_list and all(type(number) in types for number in value) else None

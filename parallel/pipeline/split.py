"""Which layers each pipeline stage holds: always every layer, each exactly once, in order. Free of torch."""

from collections.abc import Sequence
from typing import Any

from bagualu.comm.errors import RecipeError
from bagualu.parallel.pipeline.schedule import Placement


def require_layers(layers: int, placement: Placement) -> None:
    """Every stage holds at least one layer. Raises RecipeError."""
    ranks, chunks = placement.ranks, placement.chunks
    if ranks * chunks > layers:
        each = f" of parallel.virtual_stages={chunks} stages each" if chunks > 1 else " stages"
        fits = f"parallel.pipeline={layers // chunks} or less" if layers >= chunks else f"model.layers={ranks * chunks}"
        raise RecipeError(f"parallel.pipeline={ranks}{each} are more than model.layers={layers}; give {fits}")


def split_layers(layers: int, placement: Placement, balance: Any = "uniform") -> list[range]:
    """Contiguous slices of `layers` layers, one for each stage, in the order of the model.

    uniform gives every rank as many as any other, and one more to some where a rest is left: to the middle stages, or where they
    lie in a V to the last ranks, since the ends carry the embedding, the head and the loss as well. A list gives the number of
    layers of each stage.
    Raises RecipeError when it cannot be done; no layer is ever dropped.
    """
    require_layers(layers, placement)
    stages = placement.stages
    counts = _uniform(layers, placement) if balance == "uniform" else _listed(layers, placement, balance)
    starts = [sum(counts[:stage]) for stage in range(stages)]
    return [range(start, start + count) for start, count in zip(starts, counts, strict=True)]


def _uniform(layers: int, placement: Placement) -> list[int]:
    if not placement.v_shaped:
        return _evenly(layers, placement.stages)
    counts = [0] * placement.stages
    for rank, share in enumerate(sorted(_evenly(layers, placement.ranks))):
        for stage, count in zip(placement.stages_of(rank), _evenly(share, placement.chunks), strict=True):
            counts[stage] = count
    return counts


def _evenly(layers: int, parts: int) -> list[int]:
    """The rest goes to the middle ones."""
    base, rest = divmod(layers, parts)
    first = (parts - rest) // 2
    return [base + (first <= part < first + rest) for part in range(parts)]


def _listed(layers: int, placement: Placement, balance: Any) -> list[int]:
    stages = placement.stages
    listed = isinstance(balance, Sequence) and not isinstance(balance, str)
    if not listed or not all(type(count) is int for count in balance):
        raise RecipeError(
            f"parallel.balance={balance} is unknown; give uniform, analytic, measured or a list of {stages} layer counts"
        )
    counts = list(balance)
    if len(counts) != stages or sum(counts) != layers or min(counts) < 1:
        near = "[" + ",".join(map(str, _uniform(layers, placement))) + "]"
        raise RecipeError(f"parallel.balance={counts} must hold {stages} counts of at least 1 that add up to "
                          f"model.layers={layers}; e.g. parallel.balance={near}")  # fmt: skip
    return counts

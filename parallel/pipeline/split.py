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

    uniform gives every stage layers // stages, and one more to the middle stages where a rest is left: the first stage
    also carries the embedding, the last one the head and the loss. A list gives the number of layers of each stage.
    Raises RecipeError when it cannot be done; no layer is ever dropped.
    """
    require_layers(layers, placement)
    stages = placement.stages
    counts = _uniform(layers, stages) if balance == "uniform" else _listed(layers, stages, balance)
    starts = [sum(counts[:stage]) for stage in range(stages)]
    return [range(start, start + count) for start, count in zip(starts, counts, strict=True)]


def _uniform(layers: int, stages: int) -> list[int]:
    base, rest = divmod(layers, stages)
    first = (stages - rest) // 2
    return [base + (first <= stage < first + rest) for stage in range(stages)]


def _listed(layers: int, stages: int, balance: Any) -> list[int]:
    listed = isinstance(balance, Sequence) and not isinstance(balance, str)
    if not listed or not all(type(count) is int for count in balance):
        raise RecipeError(
            f"parallel.balance={balance} is unknown; give uniform, analytic, measured or a list of {stages} layer counts"
        )
    counts = list(balance)
    if len(counts) != stages or sum(counts) != layers or min(counts) < 1:
        near = "[" + ",".join(map(str, _uniform(layers, stages))) + "]"
        raise RecipeError(f"parallel.balance={counts} must hold {stages} counts of at least 1 that add up to "
                          f"model.layers={layers}; e.g. parallel.balance={near}")  # fmt: skip
    return counts

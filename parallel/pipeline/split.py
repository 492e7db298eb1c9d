"""Splits layers over the pipeline stages, in order. Every half of a layer is in exactly one stage."""

from collections.abc import Sequence
from itertools import accumulate, pairwise
from typing import Any

from bagualu.comm.errors import RecipeError
from bagualu.parallel.layout import StagePlacement
from bagualu.parallel.pipeline.layer_slice import HALVES, LayerSlice


def require_layers(layers: int, placement: StagePlacement) -> None:
    """Raises RecipeError if there are fewer layers than stages."""
    ranks, chunks = placement.ranks, placement.chunks
    if ranks * chunks > layers:
        each = f" of parallel.virtual_stages={chunks} stages each" if chunks > 1 else " stages"
        fits = f"parallel.pipeline={layers // chunks} or less" if layers >= chunks else f"model.layers={ranks * chunks}"
        raise RecipeError(f"parallel.pipeline={ranks}{each} are more than model.layers={layers}; give {fits}")


def split_layers(layers: int, placement: StagePlacement, balance: Any = "uniform") -> list[LayerSlice]:
    """Returns contiguous slices of `layers` layers, one per stage, in the order of the model.

    `balance` is uniform or a list with the number of layers of each stage, such as [4.5,3.5]. uniform gives every stage the same
    number of whole layers, and each remaining layer to a stage in the middle, because the first and last stages also hold the
    embedding, the head and the loss. In a V it gives every rank the same number, and the remaining layers to the last ranks, since
    the first rank has both ends. Raises RecipeError if `balance` is invalid or a stage would be empty.
    """
    require_layers(layers, placement)
    counts = _uniform(layers, placement) if balance == "uniform" else _listed(layers, placement, balance)
    borders = accumulate((int(HALVES * count) for count in counts), initial=0)
    return [LayerSlice(start, stop) for start, stop in pairwise(borders)]


def _uniform(layers: int, placement: StagePlacement) -> list[int]:
    if not placement.v_shaped:
        return _evenly(layers, placement.stages)
    counts = [0] * placement.stages
    for rank, share in enumerate(sorted(_evenly(layers, placement.ranks))):
        for stage, count in zip(placement.stages_of(rank), _evenly(share, placement.chunks), strict=True):
            counts[stage] = count
    return counts


def _evenly(layers: int, parts: int) -> list[int]:
    """Returns the number of layers of each part; the middle parts get the remaining layers."""
    base, rest = divmod(layers, parts)
    first = (parts - rest) // 2
    return [base + (first <= part < first + rest) for part in range(parts)]


def _listed(layers: int, placement: StagePlacement, balance: Any) -> list[float]:
    stages = placement.stages
    is_list = isinstance(balance, Sequence) and not isinstance(balance, str)
    if not is_list or not all(type(count) in (int, float) for count in balance):
        raise RecipeError(
            f"parallel.balance={balance} is unknown; give uniform, analytic, measured or a list of {stages} layer counts"
        )
    counts = list(balance)
    whole_halves = all((HALVES * count) % 1 == 0 for count in counts)
    if len(counts) != stages or sum(counts) != layers or min(counts) <= 0 or not whole_halves:
        near = "[" + ",".join(map(str, _uniform(layers, placement))) + "]"
        raise RecipeError(f"parallel.balance={counts} must hold {stages} positive counts of layers, whole or halves such as 1.5, "
                          f"that add up to model.layers={layers}; e.g. parallel.balance={near}")  # fmt: skip
    return counts

"""Refuses a recipe whose ranks need more memory than their devices have, and names the changes that make it fit."""

from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

from bagualu.comm.errors import RecipeError
from bagualu.parallel.config import ENGINES
from bagualu.parallel.layout import Layout
from bagualu.parallel.pipeline.registry import compute_schedule
from bagualu.trainer.costs.plan_split import measures, plan_split
from bagualu.trainer.costs.prediction import Memory, fullest, memory_text, predict, size_text
from bagualu.trainer.recipe.config import Recipe
from bagualu.trainer.recipe.device_memory import cpu_bytes, gpu_bytes

_MOST_FIXES = 2
_FEW = 2**9
"""More micro-batches than this are not planned in full, unless all of them are in flight at once."""


@dataclass(frozen=True)
class Device:
    """The memory of a rank's device."""

    memory_bytes: int
    what: str
    """Whose it is, as part of a sentence."""


def check_memory(recipe: Recipe, world: int, device: Device | None) -> None:
    """Raises RecipeError if a rank of the run on `world` ranks cannot fit its device or parallel.memory_bytes. A recipe that is not
    refused may still need more than the prediction."""
    layout = recipe.validate(world)
    try:
        memory = fullest(_memories(recipe, layout))
    except RecipeError as error:  # no split fits parallel.memory_bytes
        excess, _, other_fixes = str(error).partition("; give ")
        raise RecipeError(f"{excess}; give {' or '.join([*_fixes(recipe, world, device), other_fixes])}") from error
    need = sum(memory.values())
    if device is None or need <= device.memory_bytes:
        return
    fixes = _fixes(recipe, world, device) or ["more ranks, a smaller model or a shorter data.sequence_length"]
    raise RecipeError(f"the fullest rank needs {memory_text(memory)}: {size_text(need - device.memory_bytes)} more than the "
                      f"{size_text(device.memory_bytes)} of {device.what}; give {' or '.join(fixes)}")  # fmt: skip


def device_of(recipe: Recipe, workers: int) -> Device | None:
    """Returns the device of each of `workers` ranks on this machine; None if its memory is not known, or if parallel.memory_bytes
    takes its place."""
    if recipe.parallel.memory_bytes is not None:
        return None
    if recipe.comm.on_cpu:
        each = f"each of {workers} workers on this machine" if workers > 1 else "this machine"
        return Device(cpu_bytes() // workers, each)
    size = gpu_bytes(workers if recipe.comm.backend == "nccl" else 1)
    shared = workers if recipe.comm.backend == "simulated" else 1
    return None if size is None else Device(size // shared, "its GPU")


def _memories(recipe: Recipe, layout: Layout) -> list[Memory]:
    """Returns the memory of each pipeline rank. Raises RecipeError if no split fits parallel.memory_bytes."""
    parallel = recipe.parallel
    micro_batches = max(recipe.declared_shares(layout) or [recipe.micro_batches() // layout.data])
    planned = micro_batches
    if parallel.schedule != "gpipe" and micro_batches > _FEW:  # the number in flight depends on the number of stages alone
        planned = _FEW + (micro_batches - _FEW) % layout.pipeline
    schedule = compute_schedule(parallel.schedule, layout.pipeline, planned, parallel.virtual_stages)
    measured = measures(recipe) or parallel.speeds == "measured"
    split, _ = plan_split(_without_limits(recipe) if measured else recipe, layout, schedule)
    return predict(recipe, layout, split, schedule, micro_batches)


def _without_limits(recipe: Recipe) -> Recipe:
    """Returns the recipe without limits of memory, which the run itself checks with the costs that it measures. All layers
    recompute that may be chosen to, so that what the recipe needs is not overestimated."""
    recompute = "full" if recipe.activations().recompute is None else recipe.train.recompute
    return _changed(recipe, {"parallel.memory_bytes": None, "train.recompute": recompute})


def _fixes(recipe: Recipe, world: int, device: Device | None) -> list[str]:
    """Returns the changes, cheapest first, with which the recipe fits: up to two that suffice alone, else one combination."""
    alone, together = [], dict[str, Any]()
    for change in _changes(recipe, world):
        if _fits(recipe, change, world, device):
            alone.append(_typed(change))
        if len(alone) == _MOST_FIXES:
            break
    if alone:
        return alone
    for change in _changes(recipe, world):
        if _valid(recipe, together | change, world):
            together |= change
            if _fits(recipe, together, world, device):
                return [_typed(_without_unneeded(recipe, together, world, device))]
    return []


def _without_unneeded(recipe: Recipe, changes: dict[str, Any], world: int, device: Device | None) -> dict[str, Any]:
    """Returns those of `changes`, with which the recipe fits, that are needed for it."""
    for key in list(changes):
        fewer = {other: value for other, value in changes.items() if other != key}
        if _fits(recipe, fewer, world, device):
            changes = fewer
    return changes


def _changes(recipe: Recipe, world: int) -> Iterator[dict[str, Any]]:
    """Yields changes that save memory, the cheapest first: those that divide more of the state, recomputation, smaller
    micro-batches, and more of the ranks for the pipeline or the tensor axis in place of the data axis."""
    parallel, layout = recipe.parallel, recipe.parallel.layout(world)
    if layout.fold > 1:
        for zero in sorted(ENGINES[parallel.engine]):
            if zero > parallel.zero_stage:
                yield {"parallel.zero": zero}
    if set(recipe.activations().recompute or ["full"]) != {"full"}:
        yield {"train.recompute": "full"}
    size = recipe.train.micro_batch
    while size := size // 2:
        yield {"train.micro_batch": size}
    degree = 2
    while layout.data % degree == 0:
        for axis in ("pipeline", "tensor"):
            data = None if parallel.data is None else layout.data // degree
            yield {f"parallel.{axis}": layout.size(axis) * degree} | ({} if data is None else {"parallel.data": data})
        degree *= 2


def _changed(recipe: Recipe, changes: dict[str, Any]) -> Recipe:
    for key, value in changes.items():
        section, field = key.split(".")
        recipe = replace(recipe, **{section: replace(getattr(recipe, section), **{field: value})})
    return recipe


def _valid(recipe: Recipe, changes: dict[str, Any], world: int) -> bool:
    with suppress(RecipeError):
        _changed(recipe, changes).validate(world)
        return True
    return False


def _fits(recipe: Recipe, changes: dict[str, Any], world: int, device: Device | None) -> bool:
    with suppress(RecipeError):
        changed = _changed(recipe, changes)
        need = sum(fullest(_memories(changed, changed.validate(world))).values())
        return device is None or need <= device.memory_bytes
    return False


def _typed(changes: dict[str, Any]) -> str:
    return " ".join(f"{key}={value}" for key, value in changes.items())

"""Refuses a recipe whose ranks need more memory than their devices have, and names the changes that make it fit."""

from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import lru_cache
from math import prod
from typing import Any

from bagualu.comm.errors import RecipeError
from bagualu.parallel.balance.stages.keys import COMPUTED
from bagualu.parallel.config import ENGINES
from bagualu.parallel.layout import Layout
from bagualu.parallel.pipeline.registry import compute_schedule
from bagualu.parallel.pipeline.schedules.schedule import Schedule
from bagualu.trainer.costs.plan_split import measures, plan_split
from bagualu.trainer.costs.prediction import Memory, fullest, memory_text, predict, size_text
from bagualu.trainer.costs.work import ITEM_BYTES
from bagualu.trainer.models.decoder.shapes import parameter_shapes
from bagualu.trainer.recipe.changed import changed
from bagualu.trainer.recipe.config import Recipe
from bagualu.trainer.recipe.device_memory import cpu_bytes, gpu_bytes

_TOLERANCE = 0.05
"""By this fraction a prediction may be too high: a recipe is refused only if it needs more of its device than this beyond it."""
_MEASURED_LESS = 0.1
"""By this fraction measured activations may be smaller than those computed from shapes."""
_MOST_FIXES = 2
_OFFLOAD = "train.offload_bytes"
_MOST_DOUBLINGS = 7
_SMALLER = "a smaller model or a shorter data.sequence_length"
_ROUNDS = 3
"""From this many micro-batches per pipeline rank on, further ones repeat what is in flight already."""
_FEW = 2**9
"""The same where the groups of interleaved_1f1b have more micro-batches than there are ranks, and about the same for splits that
are computed from the time of a step."""


@dataclass(frozen=True)
class Device:
    """The memory of a rank's device."""

    memory_bytes: int
    what: str
    """Whose it is, as part of a sentence."""


def check_memory(recipe: Recipe, world: int, device: Device | None) -> None:
    """Raises RecipeError if a rank of the run on `world` ranks cannot fit its device or parallel.memory_bytes. A recipe that is not
    refused may still need more than the prediction, or more than the device by less than `_TOLERANCE`."""
    layout = recipe.validate(world)
    try:
        memory = fullest(memories(recipe, layout))
    except RecipeError as error:  # no split fits the limits
        excess, _, other_fix = str(error).partition("; give ")
        fixes = _fixes(recipe, world, device)
        if "parallel.memory_bytes=" not in other_fix or fits(changed(recipe, {"parallel.memory_bytes": None}), world, device):
            fixes.append(other_fix)  # a higher limit only if the device has as much
        elif not fixes and device is not None:
            fixes = _more_ranks(recipe, world, device)
        raise RecipeError(f"{excess}; give {' or '.join(fixes or [_SMALLER])}") from error
    if device is None or sum(memory.values()) <= device.memory_bytes * (1 + _TOLERANCE):
        return
    raise RecipeError(excess_text(memory, device, _fixes(recipe, world, device) or _more_ranks(recipe, world, device)))


def what_fits(recipe: Recipe, world: int, device: Device, memory: Memory) -> list[str]:
    """Returns changes, as typed, with which a recipe fits whose fullest rank was found by a trace to need `memory`, more than the
    device has. What is predicted of changed recipes is corrected by as much as the prediction of this one is wrong. Activations in
    host memory are not among the changes, because a trace cannot have them."""
    predicted = sum(fullest(memories(recipe, recipe.validate(world))).values())
    comparable = replace(device, memory_bytes=device.memory_bytes * predicted // sum(memory.values()))
    fixes = [fix for fix in _fixes(recipe, world, comparable) if _OFFLOAD not in fix]
    return fixes or _more_ranks(recipe, world, comparable)


def excess_text(memory: Memory, device: Device, fixes: Sequence[str]) -> str:
    """Returns the message that refuses a recipe whose fullest rank needs `memory`, more than the device has."""
    more = size_text(sum(memory.values()) - device.memory_bytes)
    has = f"the {size_text(device.memory_bytes)} of {device.what}"
    return f"the fullest rank needs {memory_text(memory)}: {more} more than {has}; give {' or '.join(fixes or [_SMALLER])}"


def device_of(recipe: Recipe, workers: int) -> Device | None:
    """Returns the device of each of `workers` ranks on this machine; None if its memory is not known."""
    if recipe.comm.on_cpu:
        each = f"each of {workers} workers on this machine" if workers > 1 else "this machine"
        return Device(cpu_bytes() // workers, each)
    size = gpu_bytes(workers if recipe.comm.backend == "nccl" else 1)
    shared = workers if recipe.comm.backend == "simulated" else 1
    return None if size is None else Device(size // shared, "its GPU")


def fits(recipe: Recipe, world: int, device: Device | None) -> bool:
    """Returns whether `check_memory` accepts a valid recipe."""
    with suppress(RecipeError):
        need = sum(fullest(memories(recipe, recipe.validate(world))).values())
        return device is None or need <= device.memory_bytes * (1 + _TOLERANCE)
    return False


def memories(recipe: Recipe, layout: Layout) -> list[Memory]:
    """Returns the memory of each pipeline rank. Raises RecipeError if no split fits parallel.memory_bytes and train.recompute."""
    schedule, micro_batches = memory_schedule(recipe, layout)
    try:
        split, _ = plan_split(recipe, layout, schedule, micro_batches)
    except RecipeError:
        most = recipe.activations().most_bytes
        if most is None or not measures(recipe):
            raise
        loose = changed(recipe, {"train.recompute": f"bytes:{int(most * (1 + _MEASURED_LESS))}"})
        with suppress(RecipeError):  # the run itself decides, with the bytes that it measures
            return predict(recipe, layout, plan_split(loose, layout, schedule, micro_batches)[0], schedule, micro_batches)
        raise
    return predict(recipe, layout, split, schedule, micro_batches)


def memory_schedule(recipe: Recipe, layout: Layout) -> tuple[Schedule, int]:
    """Returns a schedule with the moments of most memory of a run, and the run's number of micro-batches for each data rank, which
    may be larger than that of the schedule."""
    parallel = recipe.parallel
    micro_batches = max(recipe.declared_shares(layout) or [recipe.micro_batches() // layout.data])
    planned = _planned(recipe, layout.pipeline, micro_batches)
    return _schedule(parallel.schedule, layout.pipeline, planned, parallel.virtual_stages), micro_batches


@lru_cache(maxsize=64)
def _schedule(name: str, ranks: int, micro_batches: int, chunks: int | None) -> Schedule:
    """Returns `compute_schedule`, once for all layouts that differ in other things only."""
    return compute_schedule(name, ranks, micro_batches, chunks)


def _planned(recipe: Recipe, ranks: int, micro_batches: int) -> int:
    """Returns the least number of micro-batches known to have the same moments of most memory as `micro_batches`."""
    schedule = recipe.parallel.schedule
    if schedule == "gpipe":  # all of them are in flight at once
        return micro_batches
    uneven = schedule == "interleaved_1f1b" and micro_batches % ranks
    few = _FEW if uneven or recipe.parallel.balance in COMPUTED else _ROUNDS * ranks
    return few + (micro_batches - few) % ranks if micro_batches > few else micro_batches


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
    """Yields changes that save memory, the cheapest first: those that divide more of the state, recomputation, host memory, smaller
    micro-batches, another engine, and more of the ranks for the pipeline or the tensor axis in place of the data axis."""
    parallel, layout = recipe.parallel, recipe.parallel.layout(world)
    if layout.fold > 1:
        for zero in sorted(ENGINES[parallel.engine]):
            if zero > parallel.zero_stage:
                yield {"parallel.zero": zero}
        if parallel.shard:
            yield from ({"parallel.shard": more} for more in range(parallel.shard + 1, layout.fold + 1) if layout.fold % more == 0)
    yield from _recomputations(recipe)
    if not recipe.comm.on_cpu:
        yield from _host_memory(recipe)
    size = recipe.train.micro_batch
    while size := size // 2:
        yield {"train.micro_batch": size}
    if layout.fold > 1 and parallel.engine != "native":
        yield {"parallel.engine": "native", "parallel.zero": 3}
    degree = 2
    while layout.data % degree == 0:
        for axis in ("pipeline", "tensor"):
            data = None if parallel.data is None else layout.data // degree
            yield {f"parallel.{axis}": layout.size(axis) * degree} | ({} if data is None else {"parallel.data": data})
        degree *= 2


def _recomputations(recipe: Recipe) -> Iterator[dict[str, Any]]:
    """Yields the values of train.recompute that compute more again than the recipe's, those that compute least first."""
    now = set(recipe.activations().recompute or ["none" if recipe.activations().recompute == () else "full"])
    if now == {"none"}:
        yield {"train.recompute": "attention"}
        if recipe.model.moe.experts:
            yield {"train.recompute": "experts"}
    if now != {"full"}:
        yield {"train.recompute": "full"}


def _host_memory(recipe: Recipe) -> Iterator[dict[str, Any]]:
    """Yields changes that keep state or activations in host memory, apart from that of the device."""
    if recipe.parallel.engine == "deepspeed" and recipe.parallel.deepspeed.offload == "none":
        yield {"parallel.deepspeed.offload": "optimizer"}
    for power in range(30, 37):
        if 2**power > recipe.train.offload_bytes:
            yield {_OFFLOAD: 2**power}


def _more_ranks(recipe: Recipe, world: int, device: Device) -> list[str]:
    """Returns the smallest number of ranks of this device, a power of two times `world`, with which the recipe fits if they divide
    more of the state and all layers recompute, and the changes; an empty list if none fits."""
    layout = recipe.parallel.layout(world)
    for factor in (2**power for power in range(1, _MOST_DOUBLINGS + 1)):
        for axis, more in (("data", {"parallel.zero": 3, "train.recompute": "full"}), ("pipeline", {"train.recompute": "full"})):
            wider = changed(recipe, {f"parallel.{axis}": layout.size(axis) * factor})
            if _fits(wider, more, world * factor, device):
                needed = _without_unneeded(wider, more, world * factor, device)
                typed = _typed({f"parallel.{axis}": layout.size(axis) * factor} | needed)
                return [f"{world * factor} ranks with as much memory each: {typed}"]
    return []


def _valid(recipe: Recipe, changes: dict[str, Any], world: int) -> bool:
    with suppress(RecipeError):
        changed(recipe, changes).validate(world)
        return True
    return False


def _fits(recipe: Recipe, changes: dict[str, Any], world: int, device: Device | None) -> bool:
    with suppress(RecipeError):
        other = changed(recipe, changes)
        layout = other.validate(world)
        if device is not None and _weights_bytes(other) > device.memory_bytes * world:
            return False  # without a prediction, which takes long for thousands of layers
        need = sum(fullest(memories(other, layout)).values())
        return device is None or need <= device.memory_bytes
    return False


def _weights_bytes(recipe: Recipe) -> int:
    """Returns the bytes of one copy of the model's weights, which all ranks together hold at least."""
    return sum(map(prod, parameter_shapes(recipe.model).values())) * ITEM_BYTES[recipe.train.stored_dtype]


def _typed(changes: dict[str, Any]) -> str:
    return " ".join(f"{key}={value}" for key, value in changes.items())

"""A prediction as text for people, and as the document that --json prints."""

from collections.abc import Iterator, Sequence
from dataclasses import asdict
from itertools import groupby
from math import prod
from typing import Any

from bagualu.comm.topology import Cluster
from bagualu.parallel.memory_kinds import KINDS
from bagualu.parallel.simulation.error_band import PART, ErrorBand, error_band
from bagualu.parallel.simulation.seconds_text import seconds_text, span_text
from bagualu.parallel.simulation.step_parts import meaning
from bagualu.trainer.costs.fits import Device, excess_text, what_fits
from bagualu.trainer.costs.prediction import size_text
from bagualu.trainer.models.decoder.shapes import parameter_shapes
from bagualu.trainer.simulation.predict import Prediction, RankMemory

_UNITS = ((2**30, "GiB"), (2**20, "MiB"))


def report_text(prediction: Prediction) -> str:
    """Returns the lines that `bagualu simulate` prints."""
    return "\n".join([title(prediction), "", *caption(prediction), "", *_parts(prediction), "", *_memory(prediction)])


def as_document(prediction: Prediction) -> dict[str, Any]:
    """Returns the document that --json prints: seconds, bytes, and fractions from 0 to 1."""
    recipe, layout, fullest, band = prediction.recipe, prediction.layout, prediction.fullest, _band(prediction)
    return {
        "recipe": recipe.run.name,
        "cluster": prediction.cluster.name,
        "chips": {part.chip.name: part.devices for part in prediction.cluster.parts},
        "world": layout.world,
        "layout": {axis: layout.size(axis) for axis in ("data", "tensor", "pipeline", "expert", "context")},
        "dtype": recipe.train.dtype,
        "step_seconds": prediction.step_seconds,
        "stragglers": prediction.stragglers,
        "slowest_pace": prediction.slowest_pace,
        "error_band": None if band is None else asdict(band),
        "tokens": prediction.tokens,
        "tokens_per_second_per_device": prediction.tokens_per_second_per_device,
        "mfu": prediction.mfu,
        "hfu": prediction.hfu,
        "bubble": prediction.replayed.bubble,
        "exposed_seconds": prediction.replayed.exposed(),
        "parts_seconds": prediction.parts(),
        "memory_bytes": fullest.peak.bytes,
        "memory_limit_bytes": fullest.limit_bytes,
        "fits": prediction.fits,
        "pipeline_ranks": [
            {
                "pipeline": memory.pipeline,
                "memory_bytes": memory.peak.bytes,
                "by_kind": dict(memory.peak.by_kind),
                "limit_bytes": memory.limit_bytes,
                "moment": memory.moment,
                "moment_seconds": memory.peak.seconds,
            }
            for memory in prediction.memory
        ],
    }


def excess(prediction: Prediction) -> str:
    """Returns by how much the fullest rank of a prediction is too full, and what would make it fit."""
    fullest = prediction.fullest
    chip = fullest.chip
    device = Device(fullest.limit_bytes, f"{chip.name} without the {size_text(chip.context_bytes)} that its driver takes")
    memory = {kind: fullest.peak.by_kind.get(kind, 0) for kind in KINDS}
    return excess_text(memory, device, what_fits(prediction.recipe, prediction.layout.world, device, memory))


def title(prediction: Prediction) -> str:
    """Returns what is predicted."""
    recipe, cluster = prediction.recipe, prediction.cluster
    chips = " and ".join(f"{part.devices:,} {part.chip.name}" for part in cluster.parts)
    how = ", ".join([str(prediction.layout), recipe.parallel.engine_text, recipe.train.dtype])
    return f"{recipe.run.name} on {chips} (cluster={cluster.name}): {how}"


def quick_text(cluster: Cluster) -> str:
    """Says that the figures of a cluster were measured quickly."""
    return f"of {cluster.name}.yaml come from a quick measurement, which makes this less accurate: run bagualu doctor"


def caption(prediction: Prediction) -> Iterator[str]:
    """Yields the main figures, a line each."""
    seconds, tokens, recipe, fullest = prediction.step_seconds, prediction.tokens, prediction.recipe, prediction.fullest
    each, all_ = prediction.tokens_per_second_per_device, tokens / seconds
    yield f"step     {seconds_text(seconds)} for {tokens:,} tokens: {each:,.4g} tokens/s on each device, {all_:,.0f} on all"
    if band := _band(prediction):
        yield from _band_text(band)
    if prediction.cluster.quick:
        yield f"figures  {quick_text(prediction.cluster)}"
    if prediction.stragglers:
        longer = f"computes {prediction.slowest_pace - 1:.1%} longer than the mean rank"
        yield f"slowest  {longer}, if the times of ranks have a standard deviation of {prediction.stragglers:.3g}"
    peak = prediction.peak_flops_per_second / prediction.layout.world / 1e12
    again = f"HFU {prediction.hfu:.1%}, which counts what is computed again too"
    yield f"MFU      {prediction.mfu:.1%} of {peak:.4g} TFLOP/s ({recipe.train.stored_dtype}); {again}"
    yield f"bubble   {prediction.replayed.bubble:.1%} of the step, in which pipeline ranks wait for one another"
    room = f"fits, {size_text(fullest.spare_bytes)} to spare"
    if not prediction.fits:
        room = f"does not fit, {size_text(-fullest.spare_bytes)} too much"
    has = f"of {size_text(fullest.limit_bytes)} that its chip has for them"
    yield f"memory   {size_text(fullest.peak.bytes)} of tensors on the fullest rank, {has}: {room}"
    steps = recipe.train.steps
    yield f"run      train.steps={steps} take {span_text(steps * seconds)} without interruption, for {steps * tokens:.4g} tokens"


def _band(prediction: Prediction) -> ErrorBand | None:
    model = prediction.recipe.model
    parameters = sum(map(prod, parameter_shapes(model).values()))
    chip = " and ".join(part.chip.name for part in prediction.cluster.parts)
    return error_band(chip, prediction.layout.world, parameters, "moe" if model.moe.experts else "dense")


def _band_text(band: ErrorBand) -> Iterator[str]:
    """Yields the band, and below it which runs it is taken from."""
    fewest, most = band.devices
    took = f"took {band.least:.2f} to {band.most:.2f} times what is predicted for them"
    yield f"error    {PART:.0%} of the {band.rows} published runs most like this one {took}"
    beyond = "; none is on this chip, of this kind and nearly as large" if band.beyond else ""
    yield f"         they are of {fewest:,} to {most:,} devices: {', '.join(band.chips)}{beyond}"


def _parts(prediction: Prediction) -> Iterator[str]:
    """Yields a table of what the step consists of."""
    parts = sorted(prediction.parts().items(), key=lambda part: -part[1])
    width = max(len(what) for what, _ in parts)
    yield "where the step goes, the mean of all ranks; communication only where no computation hides it"
    for what, seconds in parts:
        yield f"  {what:<{width}}  {seconds_text(seconds):>9}  {seconds / prediction.step_seconds:>6.1%}  {meaning(what)}".rstrip()


def _memory(prediction: Prediction) -> Iterator[str]:
    """Yields a table with a row for each pipeline rank, neighbours that are alike in one row."""
    most = max(memory.peak.bytes for memory in prediction.memory)
    unit, name = next((unit for unit in _UNITS if most >= unit[0]), _UNITS[-1])
    kinds = [kind for kind in KINDS if any(memory.peak.by_kind.get(kind) for memory in prediction.memory)]

    def cells(memory: RankMemory) -> tuple[str, ...]:
        sizes = [memory.peak.bytes, memory.spare_bytes, *(memory.peak.by_kind.get(kind, 0) for kind in kinds)]
        return tuple(f"{size / unit:.1f}" for size in sizes)

    yield f"memory of tensors on each pipeline rank at its fullest moment, in {name}"
    rows: list[Sequence[str]] = [("rank", "all", "spare", *(kind.replace("_", " ") for kind in kinds), "moment")]
    for sizes, group in groupby(prediction.memory, cells):
        alike = list(group)
        first, last = alike[0].pipeline, alike[-1].pipeline
        rows.append((str(first) if first == last else f"{first}-{last}", *sizes, alike[0].moment))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for *numbers, moment in rows:
        yield "  ".join(["", *(cell.rjust(width) for cell, width in zip(numbers, widths[:-1], strict=True)), moment])

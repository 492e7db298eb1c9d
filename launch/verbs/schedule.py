"""`bagualu schedule name=zb_v stages=4 micro_batches=8`, or RUN_DIR: draws a pipeline schedule, with its bubble and activations.

Hydra and matplotlib are imported only when needed.
"""

import os
import shutil
import sys
from dataclasses import dataclass
from difflib import get_close_matches
from fractions import Fraction
from pathlib import Path
from typing import Any

from bagualu.comm.errors import RecipeError
from bagualu.fault_tolerance.run_directory import RunDirectory
from bagualu.launch.verbs.command_line import SCHEDULE_KEYS, SEVERAL, CommandLine
from bagualu.parallel.pipeline.check import check
from bagualu.parallel.pipeline.draw_text import draw
from bagualu.parallel.pipeline.recorded_timeline import Measured, check_against, mean_costs, read_measured
from bagualu.parallel.pipeline.registry import FAMILIES, compute_schedule
from bagualu.parallel.pipeline.schedules.formula import Size, Time
from bagualu.parallel.pipeline.schedules.schedule import Schedule, with_messages
from bagualu.parallel.pipeline.timeline import Timeline, per_kind, simulate
from bagualu.trainer.process.failure import DONE

_EXAMPLE = "e.g. bagualu schedule name=zb_v stages=4 micro_batches=8"
_IN_A_RECIPE = {"parallel.schedule": "name", "parallel.pipeline": "stages", "parallel.virtual_stages": "chunks"}
_PICTURES = (".svg", ".png")
_COLUMNS = 240
"""Width in columns of the widest text drawing that is printed when the output is not a terminal."""


@dataclass(frozen=True)
class _Plan:
    """A schedule with the computed times of its passes."""

    name: str
    schedule: Schedule
    size: Size
    timeline: Timeline

    @property
    def peaks(self) -> list[int]:
        return check(with_messages(self.schedule))

    @property
    def formula_bubble(self) -> Time | None:
        return FAMILIES[self.name].formula.share(self.size)


def schedule(request: CommandLine) -> tuple[int, Any]:
    """Print the schedule, and draw it into a file if `out` is given. Returns the exit code and the object that --json prints.
    Raises RecipeError."""
    given = _read(request.overrides)
    out = _picture_path(given.pop("out", None))
    run = given.pop("run", None)
    plan, measured = _of_run(Path(run), given) if run is not None else (_planned(given), None)
    if not request.json:
        _print(plan, measured)
    if out is not None:
        _draw(plan, measured, out)
        if not request.json:
            print(f"drawn: {out}")
    return DONE, _document(plan, measured, out)


def _read(arguments: list[str]) -> dict[str, str]:
    """Returns the key=value arguments as a dictionary; an argument that is a run directory gets the key `run`. Raises
    RecipeError."""
    given: dict[str, str] = {}
    for argument in arguments:
        key, equals, value = argument.partition("=")
        if not equals or (key not in SCHEDULE_KEYS and ("/" in key or Path(argument).is_dir())):  # sweep directories contain =
            key, value = "run", os.path.expanduser(argument)
        elif key not in SCHEDULE_KEYS:
            near = [_IN_A_RECIPE[key]] if key in _IN_A_RECIPE else get_close_matches(key, SCHEDULE_KEYS, n=1)
            hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(SCHEDULE_KEYS)}"
            raise RecipeError(f"schedule has no key {key}; {hint}")
        if key in given:
            raise RecipeError(f"{argument} is the second {key}; give one")
        given[key] = value
    unused = [key for key in given if key not in ("run", "out", "message")] if "run" in given else []
    if unused:
        raise RecipeError(f"{unused[0]}={given[unused[0]]} does not go with a run directory, whose recipe sets it; leave it out")
    return given


def _picture_path(out: str | None) -> Path | None:
    if out is None:
        return None
    path = Path(os.path.expanduser(out))
    if path.suffix not in _PICTURES:
        raise RecipeError(f"out={out} must end in .svg or .png; give out={path.with_suffix('.svg')}")
    if not path.parent.is_dir():
        raise RecipeError(f"{path.parent} does not exist; make it, or give out={path.name}")
    return path


def _planned(given: dict[str, str]) -> _Plan:
    for key in ("name", "stages", "micro_batches"):
        if key not in given:
            names = f" (one of {', '.join(FAMILIES)})" if key == "name" else ""
            raise RecipeError(f"schedule needs {key}=...{names}; {_EXAMPLE}")
    chunks = _count(given, "chunks") if "chunks" in given else None
    forward, input_gradient, weight_gradient = (_time(given, key, 1) for key in ("forward", "input", "weight"))
    if not forward or not input_gradient:
        raise RecipeError("forward and input must be more than 0, e.g. forward=1 input=1")
    built = _build(given["name"], _count(given, "stages"), _count(given, "micro_batches"), chunks)
    placement = built.placement
    size = Size(placement.ranks, placement.chunks, built.micro_batches, forward, input_gradient, weight_gradient)
    cost = per_kind(forward, input_gradient, weight_gradient)
    return _Plan(given["name"], built, size, simulate(built, cost, _time(given, "message", 0)))


def _build(name: str, ranks: int, micro_batches: int, chunks: int | None) -> Schedule:
    """Returns the schedule. Raises RecipeError, with the names of this command's keys instead of those of a recipe."""
    try:
        return compute_schedule(name, ranks, micro_batches, chunks)
    except RecipeError as error:
        raise RecipeError(str(error).replace("parallel.virtual_stages", "chunks").replace("parallel.schedule", "name")) from error


def _count(given: dict[str, str], key: str) -> int:
    if "," in given[key]:
        raise RecipeError(f"{key}={given[key]} gives several values; {SEVERAL['schedule']}, e.g. {key}={given[key].split(',')[0]}")
    if not given[key].isdecimal() or int(given[key]) < 1:
        raise RecipeError(f"{key}={given[key]} must be a whole number of at least 1, e.g. {key}=4")
    return int(given[key])


def _time(given: dict[str, str], key: str, default: int) -> Time:
    """Returns a time as an exact Fraction, so that a bubble of zero is computed as exactly zero. Raises RecipeError."""
    try:
        time = Fraction(given.get(key, str(default)))
    except (ValueError, ZeroDivisionError):
        time = Fraction(-1)
    if time < 0:
        raise RecipeError(f"{key}={given[key]} must be a number of at least 0, e.g. {key}=1.5")
    return time


def _of_run(folder: Path, given: dict[str, str]) -> tuple[_Plan, Measured]:
    """Returns the run's schedule, timed with the mean measured times of its passes, and the measured step. Raises RecipeError."""
    from bagualu.trainer.recipe.compose import load_recipe  # Hydra's library

    run = RunDirectory(folder)
    if not run.config.exists():
        raise RecipeError(f"{run.config} does not exist; give the directory of a run, or {_EXAMPLE.removeprefix('e.g. ')}")
    recipe = load_recipe(run.config)
    measured = read_measured(run.pipeline)
    ranks = len(measured.timeline.ranks)
    if ranks != recipe.parallel.pipeline:
        planned = f"parallel.pipeline={recipe.parallel.pipeline}"
        raise RecipeError(f"{run.pipeline} records {ranks} ranks, but the recipe has {planned}; run it again to write a new one")
    built = _build(recipe.parallel.schedule, ranks, measured.micro_batches, -(-measured.stages // ranks))
    check_against(measured, built)
    times = mean_costs(measured)
    size = Size(ranks, built.placement.chunks, measured.micro_batches, 1, 1, 1)
    return _Plan(recipe.parallel.schedule, built, size, simulate(built, times, float(_time(given, "message", 0)))), measured


def _print(plan: _Plan, measured: Measured | None) -> None:
    picture = draw(plan.schedule)
    columns = shutil.get_terminal_size().columns if sys.stdout.isatty() else _COLUMNS
    wide = max(map(len, picture.splitlines()))
    print(_title(plan))
    print(picture if wide <= columns else f"(the drawing needs {wide} columns; give out=schedule.svg to draw it into a file)")
    for line in _captions(plan, of_run=measured is not None):
        print(line)
    if measured is not None:
        print(f"{_measured_heading(measured)}: {_measured_caption(plan, measured)}")


def _draw(plan: _Plan, measured: Measured | None, out: Path) -> None:
    from bagualu.parallel.pipeline.draw_svg import Panel, draw_picture  # matplotlib, half a second

    unit = "time, in the unit of the costs" if measured is None else "seconds"
    heading = "planned" if measured is None else "planned, with the run's mean time of each pass"
    panels = [Panel(heading, _captions(plan, of_run=measured is not None), plan.timeline, unit)]
    if measured is not None:
        panels.append(Panel(_measured_heading(measured), [_measured_caption(plan, measured)], measured.timeline, "seconds"))
    draw_picture(_title(plan), panels, plan.schedule.placement.chunks, out)


def _title(plan: _Plan) -> str:
    placement = plan.schedule.placement
    chunks = f" of {placement.chunks} chunks" if placement.chunks > 1 else ""
    return f"{plan.name}: {placement.ranks} ranks{chunks}, {plan.schedule.micro_batches} micro-batches"


def _captions(plan: _Plan, of_run: bool) -> list[str]:
    formula, chunks = FAMILIES[plan.name].formula, plan.schedule.placement.chunks
    whole, own = _percent(plan.timeline.bubble), _percent(plan.timeline.own_bubble)
    bubble = f"bubble {whole} of the step, {own} of the longest rank's own time"
    if not of_run:
        share = plan.formula_bubble
        published = "not defined for this size and these costs" if share is None else _percent(share)
        bubble += f" (formula: {'at most ' if formula.bound else ''}{formula.bubble_text}: {published})"
    unit = f", each 1/{chunks} of a rank's micro-batch" if chunks > 1 else ""
    peak = f"activations in flight by rank: {_runs(plan.peaks)}{unit} (formula: {formula.peak_text})"
    return [bubble, peak]


def _measured_heading(measured: Measured) -> str:
    return f"measured in step {measured.step}"


def _measured_caption(plan: _Plan, measured: Measured) -> str:
    took, planned = float(measured.timeline.end), float(plan.timeline.end)
    times = f"{took:.4g} s, {took / planned:.2f} times the planned {planned:.4g} s"
    return f"bubble {_percent(measured.timeline.bubble)} of the step; {times}"


def _percent(share: Time) -> str:
    return f"{float(share):.1%}"


def _runs(values: list[int]) -> str:
    """Returns the values as text; for more than 8 values, only their range and the first."""
    if len(values) <= 8:
        return " ".join(map(str, values))
    return f"{values[0]} on all" if len(set(values)) == 1 else f"{min(values)} to {max(values)}, the first {values[0]}"


def _document(plan: _Plan, measured: Measured | None, out: Path | None) -> dict[str, Any]:
    formula, placement = FAMILIES[plan.name].formula, plan.schedule.placement
    published = plan.formula_bubble if measured is None else None
    document = {
        "name": plan.name,
        "stages": placement.ranks,
        "chunks": placement.chunks,
        "micro_batches": plan.schedule.micro_batches,
        **_times(plan.timeline),
        "peak_in_flight": plan.peaks,
        "formula": {
            "bubble": formula.bubble_text,
            "bubble_share": None if published is None else float(published),
            "is_bound": formula.bound,
            "peak_in_flight": formula.peak_text,
            "peak": formula.peak(plan.size),
        },
        "out": None if out is None else str(out),
    }
    return document if measured is None else {**document, "measured": {"step": measured.step, **_times(measured.timeline)}}


def _times(timeline: Timeline) -> dict[str, Any]:
    spans = [
        {
            "rank": rank,
            "kind": str(span.action.kind),
            "micro_batch": span.action.micro_batch,
            "stage": span.action.stage,
            "start": float(span.start),
            "end": float(span.end),
        }
        for rank, mine in enumerate(timeline.ranks)
        for span in mine
    ]
    return {"bubble": float(timeline.bubble), "own_bubble": float(timeline.own_bubble), "end": float(timeline.end), "spans": spans}

"""Reads the measured timeline of a run's pipeline: the times at which each pass of a step began and ended.

The file has a line per pass: {"rank", "step", "kind", "micro_batch", "stage", "start", "end"}. rank is the pipeline coordinate,
kind is F, B, I or W, and times are in seconds from an origin that all ranks share.
"""

import json
import math
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from bagualu.comm.errors import RecipeError
from bagualu.parallel.pipeline.schedules.schedule import Action, Kind, Schedule
from bagualu.parallel.pipeline.timeline import Cost, Span, Timeline


@dataclass(frozen=True)
class Measured:
    """A measured step of a run; times are in seconds from the start of the step's first pass."""

    step: int
    timeline: Timeline
    file: str
    """The name of the file, for messages."""

    @property
    def micro_batches(self) -> int:
        return 1 + max(span.action.micro_batch for spans in self.timeline.ranks for span in spans)

    @property
    def stages(self) -> int:
        return 1 + max(span.action.stage for spans in self.timeline.ranks for span in spans)


def read_measured(path: Path) -> Measured:
    """Returns the step with the highest number in the file `path`. Raises RecipeError if the file is missing, empty or invalid, or
    lacks a rank in that step."""
    if not path.exists():
        raise RecipeError(f"{path} does not exist; give the directory of a run that has trained with parallel.pipeline=2 or more")
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    rows = [_row(path, number, line) for number, line in enumerate(lines, 1) if line.strip()]
    if not rows:
        raise RecipeError(f"{path} is empty; give the directory of a run that has trained a step")
    last = max(step for step, _, _ in rows)
    origin = min(span.start for step, _, span in rows if step == last)
    ranks: list[list[Span]] = [[] for _ in range(1 + max(rank for _, rank, _ in rows))]
    for step, rank, span in rows:
        if step == last:
            ranks[rank].append(Span(span.action, span.start - origin, span.end - origin))
    if not all(ranks):
        raise RecipeError(f"{path} has no pass of rank {ranks.index([])} in step {last}; run it again to write a new file")
    return Measured(last, Timeline([sorted(spans, key=lambda span: span.start) for spans in ranks]), path.name)


def _row(path: Path, number: int, line: str) -> tuple[int, int, Span]:
    """Returns (step, pipeline rank, pass) of a line. Raises RecipeError if the line is invalid."""
    try:
        row = json.loads(line)
        action = Action(Kind(row["kind"]), int(row["micro_batch"]), int(row["stage"]))
        step, rank, span = int(row["step"]), int(row["rank"]), Span(action, float(row["start"]), float(row["end"]))
    except (ValueError, KeyError, TypeError, OverflowError, RecursionError) as error:
        raise RecipeError(f"{path}, line {number}: not a pipeline pass ({error}); run it again to write a new file") from error
    if min(action.micro_batch, action.stage, rank) < 0 or not 0 <= span.end - span.start < math.inf:
        raise RecipeError(f"{path}, line {number}: negative index or end before start; run it again to write a new file")
    return step, rank, span


def check_against(measured: Measured, schedule: Schedule) -> None:
    """Raises RecipeError unless the measured passes of each rank are exactly those of `schedule`, in any order. Both must have the
    same number of ranks."""
    for rank, planned in enumerate(schedule.actions):
        done = Counter(span.action for span in measured.timeline.ranks[rank])
        for action in Counter(planned) | done:
            if done[action] != planned.count(action):
                raise RecipeError(
                    f"{measured.file}: rank {rank} did {action} {done[action]} times, but the run's schedule has it "
                    f"{planned.count(action)} times; run it again to write a new file"
                )


def mean_costs(measured: Measured) -> Cost:
    """Returns a function that gives each pass the mean measured duration, in seconds, of its kind at its stage."""
    count: Counter[tuple[Kind, int]] = Counter()
    seconds: dict[tuple[Kind, int], float] = {}
    for spans in measured.timeline.ranks:
        for span in spans:
            key = (span.action.kind, span.action.stage)
            seconds[key] = seconds.get(key, 0.0) + float(span.end - span.start)
            count[key] += 1
    return lambda action: seconds[action.kind, action.stage] / count[action.kind, action.stage]

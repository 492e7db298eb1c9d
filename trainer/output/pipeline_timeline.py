"""Writes pipeline.jsonl: when the ranks of a pipeline computed the passes of a step. `bagualu schedule RUN_DIR` draws it.

Each line is an object for a pass: rank (coordinate on the pipeline axis), step (from 1), kind, micro_batch, stage, start and end in
seconds since the ranks met before the step. Only the pipeline of rank 0 is recorded.
"""

import json
import logging
import sys
import time
from statistics import median
from typing import Any

from bagualu.comm.agree import meet
from bagualu.comm.objects import gather_json
from bagualu.fault_tolerance.files import write_atomic
from bagualu.fault_tolerance.ledger.events import clock
from bagualu.fault_tolerance.run_directory import RunDirectory
from bagualu.parallel.balance.stages.show import show_split
from bagualu.parallel.pipeline.schedules.schedule import Kind
from bagualu.trainer.assemble import TrainerState

log = logging.getLogger(__name__)

_AFTER_STEPS = 2
"""How many steps of this process go by before the recorded step, because the first steps include warm-up."""


class PipelineRecorder:
    """Records the passes of a single step since this process started, if there is a pipeline."""

    def __init__(self, state: TrainerState, first_step: int) -> None:
        """`first_step`: the number of steps done before this process started."""
        self._state = state
        self._due = min(first_step + _AFTER_STEPS, state.recipe.train.steps - 1) if state.mesh.layout.pipeline > 1 else -1
        self._met = 0.0

    def before_step(self, step: int) -> None:
        """Waits for all ranks of the pipeline before the recorded step (collective) and notes the time. Call it before each step
        (from 0)."""
        if step == self._due:
            meet(self._state.mesh.group("pipeline"))
            self._met = time.perf_counter()

    def after_step(self, step: int, computed: bool) -> None:
        """Gathers and writes the passes if `step` is the recorded step (collective). A skipped step (not `computed`) has no passes;
        then the next step is recorded instead."""
        if step != self._due:
            return
        self._due = -1 if computed else step + 1
        if not computed:
            return
        mesh, stopwatch = self._state.mesh, self._state.runner.stopwatch
        passes = [
            {
                "rank": mesh.at("pipeline"),
                "step": step + 1,
                "kind": str(timed.action.kind),
                "micro_batch": timed.action.micro_batch,
                "stage": timed.action.stage,
                "start": timed.start,
                "end": timed.end,
            }
            for timed in stopwatch.passes()
        ]
        record = {"clock": clock(), "met": self._met, "began": stopwatch.began, "passes": passes}
        records = gather_json(record, mesh.group("pipeline"))
        if mesh.at("world") == 0:
            self._write(_aligned(records))

    def _write(self, rows: list[dict[str, Any]]) -> None:
        placement = self._state.mesh.placement
        if self._state.costs:
            print(show_split(self._state.split, placement, _measured(rows, placement.stages)), file=sys.stderr, flush=True)
        path = RunDirectory(self._state.recipe.run.dir).pipeline
        try:
            text = "".join(json.dumps(row) + "\n" for row in rows)
            write_atomic(path, text.encode())
        except OSError as error:  # no reason to end the run
            log.warning("%s was not written: %s", path.name, error)


def _aligned(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Returns all passes with times relative to when the first rank left the barrier before the step. Ranks on another machine have
    a different clock; they are assumed to have left the barrier at the same moment."""
    rows = []
    for record in records:
        met = records[0]["met"] if record["clock"] == records[0]["clock"] else record["met"]
        shift = record["began"] - met
        rows += [{**row, "start": row["start"] + shift, "end": row["end"] + shift} for row in record["passes"]]
    return rows


def _measured(rows: list[dict[str, Any]], stages: int) -> list[tuple[float, float]]:
    """Returns the seconds of a forward pass and of a whole backward pass of a micro-batch, by stage: medians over the
    micro-batches."""
    medians = []
    for stage in range(stages):
        forward: dict[int, float] = {}
        backward: dict[int, float] = {}
        for row in rows:
            if row["stage"] == stage:
                side = forward if row["kind"] == Kind.FORWARD else backward
                side[row["micro_batch"]] = side.get(row["micro_batch"], 0.0) + row["end"] - row["start"]
        medians.append((median(forward.values()), median(backward.values())))
    return medians

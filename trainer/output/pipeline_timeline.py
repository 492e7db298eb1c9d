"""pipeline.jsonl: when the ranks of the pipeline did the passes of one step. What `bagualu schedule RUN_DIR` draws.

One object a line: rank (place in the pipeline), step, kind, micro_batch, stage, start and end in seconds. Of the ranks at a place
the first one counts.
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
"""Steps of a process until the one that is recorded: the first ones pay for warming up."""


class PipelineRecorder:
    """Records one step of a run; nothing where there is no pipeline."""

    def __init__(self, state: TrainerState, first_step: int) -> None:
        """`first_step`: steps done before this process."""
        self._state = state
        self._due = min(first_step + _AFTER_STEPS, state.recipe.train.steps - 1) if state.mesh.layout.pipeline > 1 else -1
        self._met = 0.0

    def before_step(self, step: int) -> None:
        """Step `step` (from 0) begins. Collective where it is the one."""
        if step == self._due:
            meet(self._state.mesh.group("pipeline"))
            self._met = time.perf_counter()

    def after_step(self, step: int, computed: bool) -> None:
        """Collective where it is the one. A step that was left out (not `computed`) has no passes: then it is the next one."""
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
        told = {"clock": clock(), "met": self._met, "began": stopwatch.began, "passes": passes}
        ranks = gather_json(told, mesh.group("pipeline"))
        if mesh.at("world") == 0:
            self._write(_aligned(ranks))

    def _write(self, rows: list[dict[str, Any]]) -> None:
        placement = self._state.mesh.placement
        if self._state.costs:
            print(show_split(self._state.split, placement, _measured(rows, placement.stages)), file=sys.stderr, flush=True)
        path = RunDirectory(self._state.recipe.run.dir).pipeline
        try:
            text = "".join(json.dumps(row) + "\n" for row in rows)
            write_atomic(path, text.encode())
        except OSError as error:  # nothing that a run should end for
            log.warning("%s was not written: %s", path.name, error)


def _aligned(ranks: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """All passes, from one origin: when the first rank left the place where all had met. Ranks whose clock is another machine's
    are taken to have left it at that moment too."""
    rows = []
    for told in ranks:
        met = ranks[0]["met"] if told["clock"] == ranks[0]["clock"] else told["met"]
        shift = told["began"] - met
        rows += [{**row, "start": row["start"] + shift, "end": row["end"] + shift} for row in told["passes"]]
    return rows


def _measured(rows: list[dict[str, Any]], stages: int) -> list[tuple[float, float]]:
    """Seconds of a forward and of a whole backward pass of one micro-batch, by stage: medians over the micro-batches."""
    found = []
    for stage in range(stages):
        forward: dict[int, float] = {}
        backward: dict[int, float] = {}
        for row in rows:
            if row["stage"] == stage:
                side = forward if row["kind"] == Kind.FORWARD else backward
                side[row["micro_batch"]] = side.get(row["micro_batch"], 0.0) + row["end"] - row["start"]
        found.append((median(forward.values()), median(backward.values())))
    return found

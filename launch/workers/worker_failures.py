"""Why the workers of this machine have ended: what they wrote down themselves, and what their exit codes say. Free of torch."""

import json
import shutil
import signal
import time
from collections.abc import Mapping
from pathlib import Path

from bagualu.comm import jsonl
from bagualu.fault_tolerance.files import write_atomic
from bagualu.fault_tolerance.watchdog.heartbeat import HEARTBEATS, Beat, read
from bagualu.trainer.process.failure import Failure

_FAILURES = "failures"
"""Folder of the scratch folder, one file for each rank that has failed."""
_HINTS = {"SIGKILL": " (out of memory, or by hand)"}


def write_failure(scratch: Path, failure: Failure) -> None:
    """Leave `failure` where the launcher finds it."""
    path = scratch / _FAILURES / f"{failure.rank}.json"
    path.parent.mkdir(exist_ok=True)
    write_atomic(path, json.dumps(failure.as_dict()).encode())


def clear_failures(scratch: Path) -> None:
    """Forget those of workers that ended before."""
    shutil.rmtree(scratch / _FAILURES, ignore_errors=True)


def failures(scratch: Path, exit_codes: Mapping[int, int], processes: Mapping[int, int], metrics: Path) -> list[Failure]:
    """Why each of the ranks in `exit_codes` has ended.

    `processes`: the process of every rank here. A rank that could not write why it ended has left its heartbeat, which knows where
    it was; where there is none yet, the others or `metrics` (metrics.jsonl) tell the step.
    """
    written = [Failure(**json.loads(path.read_text())) for path in sorted((scratch / _FAILURES).glob("*.json"))]
    told = {one.rank for one in written}
    step = max((one.step for one in written), default=0) or _steps_done(metrics) + 1
    phase = f"step {step}" if step > 1 or metrics.exists() else "start"
    noticed = min((one.time for one in written), default=time.time())  # a killed process could not write when it died
    found = list(written)
    for rank, code in exit_codes.items():
        if code and (code < 0 or rank not in told):
            beat = read(scratch / HEARTBEATS, rank)
            mine = beat is not None and beat.pid == processes.get(rank)  # and not of the generation before
            found.append(_silent(rank, code, *((_phase(beat), beat.step) if beat and mine else (phase, step)), noticed))
    return found


def _phase(beat: Beat) -> str:
    """Where a rank was, as `failure` of a rank that can still speak says it; and for whom it waited."""
    where = f"step {beat.step}, {beat.point}" if beat.step else beat.point
    return f"{where}, waiting for {beat.operation} in {beat.line}" if beat.line else where


def _silent(rank: int, code: int, phase: str, step: int, noticed: float) -> Failure:
    """The end of a worker that could not say why."""
    if code > 0:
        return Failure(rank, phase, f"ended with exit code {code} and without a word", noticed, "killed", step)
    name = signal.Signals(-code).name
    return Failure(rank, phase, f"killed by {name}{_HINTS.get(name, '')}", noticed, "killed", step)


def _steps_done(metrics: Path) -> int:
    try:
        steps = [line["step"] for line in jsonl.read(metrics) if type(line.get("step")) is int]
    except OSError:
        return 0
    return steps[-1] if steps else 0

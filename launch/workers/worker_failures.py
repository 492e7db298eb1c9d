"""Determines why the workers of this machine ended, from the failures that they wrote and from their exit codes."""

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
"""Folder inside the scratch folder, with one file for each rank that has failed."""
_HINTS = {"SIGKILL": " (out of memory, or by hand)"}


def write_failure(scratch: Path, failure: Failure) -> None:
    """Write `failure` to the scratch folder, from which the launcher reads it."""
    path = scratch / _FAILURES / f"{failure.rank}.json"
    path.parent.mkdir(exist_ok=True)
    write_atomic(path, json.dumps(failure.as_dict()).encode())


def clear_failures(scratch: Path) -> None:
    """Remove the failures of earlier generations of workers."""
    shutil.rmtree(scratch / _FAILURES, ignore_errors=True)


def failures(scratch: Path, exit_codes: Mapping[int, int], processes: Mapping[int, int], metrics: Path) -> list[Failure]:
    """Returns the failures that ranks of this machine wrote, and a failure for each rank in `exit_codes` that was killed by a
    signal (even if it wrote a failure) or ended with another code than 0 without writing a failure.

    `processes` maps every rank here to its process id. The step in a failure that is added comes from the rank's last heartbeat, or
    else from the written failures, or else from `metrics` (metrics.jsonl).
    """
    written = [Failure(**json.loads(path.read_text())) for path in sorted((scratch / _FAILURES).glob("*.json"))]
    reported = {failure.rank for failure in written}
    step = max((failure.step for failure in written), default=0) or _steps_done(metrics) + 1
    phase = f"step {step}" if step > 1 or metrics.exists() else "start"
    noticed = min((failure.time for failure in written), default=time.time())  # a killed process could not write when it died
    result = list(written)
    for rank, code in exit_codes.items():
        if code and (code < 0 or rank not in reported):
            beat = read(scratch / HEARTBEATS, rank)
            mine = beat is not None and beat.pid == processes.get(rank)  # else it is of an earlier generation
            result.append(_silent(rank, code, *((_phase(beat), beat.step) if beat and mine else (phase, step)), noticed))
    return result


def _phase(beat: Beat) -> str:
    """Returns where a rank was, in the wording of the failures that ranks write themselves, and which collective it waited for."""
    where = f"step {beat.step}, {beat.point}" if beat.step else beat.point
    return f"{where}, waiting for {beat.operation} in {beat.line}" if beat.line else where


def _silent(rank: int, code: int, phase: str, step: int, noticed: float) -> Failure:
    """Returns the failure of a worker that ended without writing one."""
    if code > 0:
        return Failure(rank, phase, f"ended with exit code {code} without writing why", noticed, "killed", step)
    name = signal.Signals(-code).name
    return Failure(rank, phase, f"killed by {name}{_HINTS.get(name, '')}", noticed, "killed", step)


def _steps_done(metrics: Path) -> int:
    try:
        steps = [line["step"] for line in jsonl.read(metrics) if type(line.get("step")) is int]
    except OSError:
        return 0
    return steps[-1] if steps else 0

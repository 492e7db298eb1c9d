"""Why the workers of this machine have ended: what they wrote down themselves, and what their exit codes say. Free of torch."""

import json
import shutil
import signal
import time
from collections.abc import Mapping
from pathlib import Path

from bagualu.trainer.outcome import Failure

_FAILURES = "failures"
"""Folder of the scratch folder, one file for each rank that has failed."""
_HINTS = {"SIGKILL": " (out of memory, or by hand)"}


def write_failure(scratch: Path, failure: Failure) -> None:
    """Leave `failure` where the launcher finds it."""
    path = scratch / _FAILURES / f"{failure.rank}.json"
    path.parent.mkdir(exist_ok=True)
    path.with_suffix(".new").write_text(json.dumps(failure.as_dict()))
    path.with_suffix(".new").replace(path)


def clear_failures(scratch: Path) -> None:
    """Forget those of workers that ended before."""
    shutil.rmtree(scratch / _FAILURES, ignore_errors=True)


def failures(scratch: Path, exit_codes: Mapping[int, int], metrics: Path) -> list[Failure]:
    """Why each of the ranks in `exit_codes` has ended. `metrics` (metrics.jsonl) tells the step where no rank could."""
    written = [Failure(**json.loads(path.read_text())) for path in sorted((scratch / _FAILURES).glob("*.json"))]
    told = {one.rank for one in written}
    step = max((one.step for one in written), default=0) or _steps_done(metrics) + 1
    phase = f"step {step}" if step > 1 or metrics.exists() else "start"
    noticed = min((one.time for one in written), default=time.time())  # a killed process could not write when it died
    silent = {rank: code for rank, code in exit_codes.items() if code and (code < 0 or rank not in told)}
    return [*written, *(_silent(rank, code, phase, step, noticed) for rank, code in silent.items())]


def _silent(rank: int, code: int, phase: str, step: int, noticed: float) -> Failure:
    """The end of a worker that could not say why."""
    if code > 0:
        return Failure(rank, phase, f"ended with exit code {code} and without a word", noticed, "killed", step)
    name = signal.Signals(-code).name
    return Failure(rank, phase, f"killed by {name}{_HINTS.get(name, '')}", noticed, "killed", step)


def _steps_done(metrics: Path) -> int:
    try:
        return int(json.loads(metrics.read_text().splitlines()[-1])["step"])
    except (OSError, ValueError, IndexError, KeyError):
        return 0

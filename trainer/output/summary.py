"""Reads and writes summary.json of a run, whose `ended` says how the latest start of the run ended (done | stopped | failed), or
that it has not ended (running).

    running          `since` (ISO 8601), `steps`
    done, stopped    the final values, which rank 0 writes (run.py)
    failed           `failure`, the fields of `failure.Failure`; `step`, the last step in metrics.jsonl; `steps`. A run that was
                     stopped before its first step has the same keys, with `ended` "stopped"

If the latest start has no final values, the file keeps those of an earlier start under `previous`. If all processes of a run are
killed with kill -9, `ended` stays "running". The file is always replaced atomically.
"""

import json
from contextlib import suppress
from pathlib import Path
from typing import Any

from bagualu.comm import jsonl
from bagualu.fault_tolerance.files import write_atomic
from bagualu.fault_tolerance.run_directory import RunDirectory

_FINAL = "done", "stopped"


def read(run_dir: Path) -> dict[str, Any]:
    """Returns the content of summary.json; {} if there is no such file or it is damaged. Raises OSError."""
    with suppress(FileNotFoundError, ValueError):
        summary = json.loads(RunDirectory(run_dir).summary.read_text(encoding="utf-8"))
        return summary if isinstance(summary, dict) else {}
    return {}


def final(run_dir: Path) -> dict[str, Any]:
    """Returns the final values of the latest start that has any; {} if none has. Raises OSError."""
    summary = read(run_dir)
    previous = summary.get("previous")
    return summary if has_figures(summary) else previous if isinstance(previous, dict) else {}


def write(run_dir: Path, summary: dict[str, Any]) -> None:
    """Replaces the content of summary.json by `summary`. Raises OSError; then the file has not changed."""
    write_atomic(RunDirectory(run_dir).summary, (jsonl.dumps(summary, indent=2) + "\n").encode())


def has_figures(summary: dict[str, Any]) -> bool:
    """Returns whether `summary` has the final values that rank 0 wrote."""
    return summary.get("ended") in _FINAL and "failure" not in summary

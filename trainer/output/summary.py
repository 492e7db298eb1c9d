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
import logging
from collections.abc import Callable
from contextlib import suppress
from datetime import datetime
from pathlib import Path
from typing import Any

from bagualu.comm import jsonl
from bagualu.comm.errors import RecipeError, StorageError
from bagualu.fault_tolerance import run_lock
from bagualu.fault_tolerance.files import write_atomic
from bagualu.fault_tolerance.run_directory import RunDirectory
from bagualu.fault_tolerance.within import within
from bagualu.trainer.process.failure import Failure
from bagualu.trainer.recipe.config import Recipe

_FINAL = "done", "stopped"
_MOST_SECONDS = 10.0
"""The most seconds that an update of summary.json may take: longer than `run_lock.hold` waits for another process's lock, and
longer than working storage takes."""
log = logging.getLogger(__name__)


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
    return summary if _has_figures(summary) else previous if isinstance(previous, dict) else {}


def write(run_dir: Path, summary: dict[str, Any]) -> None:
    """Replaces the content of summary.json by `summary`. Raises OSError; then the file has not changed."""
    write_atomic(RunDirectory(run_dir).summary, (jsonl.dumps(summary, indent=2) + "\n").encode())


class Start:
    """Records a start of a run in summary.json, in the process that holds the lock of the run directory.

    No method raises: if the file cannot be written within _MOST_SECONDS, a warning is logged.
    """

    def __init__(self, recipe: Recipe) -> None:
        self._recipe, self._run_dir = recipe, Path(recipe.run.dir)
        self._before: bytes | None = None
        self.begun = False

    def begin(self) -> None:
        """Records that the start is running (`ended` is "running"). After a restart of workers it is called again."""
        self._say(self._begin)

    def finish(self, summary: dict[str, Any]) -> None:
        """Records the end of the start: writes `summary`, which rank 0 returned, unless rank 0 has written it already."""
        self._say(lambda: None if _has_figures(read(self._run_dir)) else write(self._run_dir, summary))

    def fail(self, failure: Failure) -> None:
        """Records that the start ended with `failure`, which includes a request to stop before the first step."""
        self._say(lambda: self._fail(failure))

    def refuse(self) -> None:
        """Restores the file as it was before `begin`, because the recipe was refused."""
        if self.begun:
            self._say(self._restore)

    def fail_if_left(self, failure: Failure) -> None:
        """Does the same as `fail`, from a process of the run that does not hold the lock, but only if the process that held the
        lock is gone and summary.json still says "running"."""
        self._say(lambda: self._fail_if_left(failure))

    def _say(self, entry: Callable[[], None]) -> None:
        try:
            within(_MOST_SECONDS, entry)
        except (OSError, StorageError) as error:
            log.warning("%s is not up to date: %s", RunDirectory(self._run_dir).summary, getattr(error, "strerror", None) or error)

    def _begin(self) -> None:
        path = RunDirectory(self._run_dir).summary
        if not self.begun:
            self._before = path.read_bytes() if path.exists() else None
            self.begun = True
        since = datetime.now().astimezone().isoformat("T", "seconds")
        write(self._run_dir, {"ended": "running", "since": since, **self._common()})

    def _fail(self, failure: Failure) -> None:
        ended = "stopped" if failure.kind == "stopped" else "failed"
        write(self._run_dir, {"ended": ended, "step": self._last_step(), "failure": failure.as_dict(), **self._common()})

    def _restore(self) -> None:
        path = RunDirectory(self._run_dir).summary
        if self._before is None:
            path.unlink(missing_ok=True)
        else:
            write_atomic(path, self._before)

    def _fail_if_left(self, failure: Failure) -> None:
        try:
            with run_lock.hold(self._run_dir):
                if read(self._run_dir).get("ended") == "running":
                    self._fail(failure)
        except RecipeError:
            return  # the lock is held, by that process or by another start

    def _common(self) -> dict[str, Any]:
        previous = final(self._run_dir)
        common = {"steps": self._recipe.train.steps, "run_dir": self._recipe.run.dir}
        return {**common, "previous": previous} if previous else common

    def _last_step(self) -> int:
        lines = jsonl.read(RunDirectory(self._run_dir).metrics)
        return max((line["step"] for line in lines if type(line.get("step")) is int), default=0)


def _has_figures(summary: dict[str, Any]) -> bool:
    return summary.get("ended") in _FINAL and "failure" not in summary

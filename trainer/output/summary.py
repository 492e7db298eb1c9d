"""summary.json of a run: how its latest start ended (`ended`: done | stopped | failed), or that one is under way (running).

    running    `since` (ISO 8601), `steps`
    done, stopped    the final figures, which rank 0 writes (run.py)
    failed     `failure`, as `outcome.Failure`; `step`, the last step recorded. Also where a run was stopped before its first step

A start that has no final figures of its own keeps those of the start before it under `previous`. After a kill -9 of all
processes of a run it stays "running". Every version of the file appears in one moment. Free of torch.
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
"""More than a lock of another process is waited for, and than storage that answers takes."""
log = logging.getLogger(__name__)


def read(run_dir: Path) -> dict[str, Any]:
    """What summary.json holds; {} where there is none, or it is damaged. Raises OSError."""
    with suppress(FileNotFoundError, ValueError):
        found = json.loads(RunDirectory(run_dir).summary.read_text(encoding="utf-8"))
        return found if isinstance(found, dict) else {}
    return {}


def final(run_dir: Path) -> dict[str, Any]:
    """The final figures of the last start that has any; {} where none has. Raises OSError."""
    found = read(run_dir)
    previous = found.get("previous")
    return found if _has_figures(found) else previous if isinstance(previous, dict) else {}


def write(run_dir: Path, summary: dict[str, Any]) -> None:
    """Make `summary` what the file holds. Raises OSError, and then the file is as it was."""
    write_atomic(RunDirectory(run_dir).summary, (jsonl.dumps(summary, indent=2) + "\n").encode())


class Start:
    """What summary.json says of one start of a run, on the process that keeps others out of the run directory.

    Never raises: what cannot be written, or not within some seconds, costs a warning.
    """

    def __init__(self, recipe: Recipe) -> None:
        self._recipe, self._run_dir = recipe, Path(recipe.run.dir)
        self._before: bytes | None = None
        self.begun = False

    def begin(self) -> None:
        """The start is under way."""
        self._say(self._begin)

    def finish(self, summary: dict[str, Any]) -> None:
        """Rank 0 has returned `summary`, which it has written itself as a rule."""
        self._say(lambda: None if _has_figures(read(self._run_dir)) else write(self._run_dir, summary))

    def fail(self, failure: Failure) -> None:
        """The start has ended with `failure`; what was asked to stop before its first step too."""
        self._say(lambda: self._fail(failure))

    def refuse(self) -> None:
        """The recipe was refused: there was no start."""
        if self.begun:
            self._say(self._restore)

    def fail_if_left(self, failure: Failure) -> None:
        """As `fail`, on any other process of the run: only if the one that kept others out is gone and has written no end."""
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
            return  # that process lives, or another start does

    def _common(self) -> dict[str, Any]:
        previous = final(self._run_dir)
        common = {"steps": self._recipe.train.steps, "run_dir": self._recipe.run.dir}
        return {**common, "previous": previous} if previous else common

    def _last_step(self) -> int:
        lines = jsonl.read(RunDirectory(self._run_dir).metrics)
        return max((line["step"] for line in lines if type(line.get("step")) is int), default=0)


def _has_figures(summary: dict[str, Any]) -> bool:
    return summary.get("ended") in _FINAL and "failure" not in summary

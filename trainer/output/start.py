"""Records a start of a run: its recipe in config.yaml, and in summary.json that it runs and how it ended."""

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
from bagualu.trainer.output.summary import final, has_figures, read, write
from bagualu.trainer.process.failure import Failure
from bagualu.trainer.recipe.compose import save_recipe
from bagualu.trainer.recipe.config import Recipe

_MOST_SECONDS = 10.0
"""The most seconds that an update of summary.json may take: longer than `run_lock.hold` waits for another process's lock, and
longer than working storage takes."""
log = logging.getLogger(__name__)


class Start:
    """Records a start of a run in config.yaml and summary.json, in the process that holds the lock of the run directory.

    No method but `save_recipe` raises: if summary.json cannot be written within _MOST_SECONDS, a warning is logged.
    """

    def __init__(self, recipe: Recipe) -> None:
        self._recipe, self._run_dir = recipe, Path(recipe.run.dir)
        self._before: dict[Path, bytes | None] = {}
        """The content of the files before this start; None for a file that did not exist."""
        self.begun = False

    def save_recipe(self) -> None:
        """Writes the recipe to config.yaml. Call before `begin`. Raises RecipeError if the file cannot be written."""
        with suppress(OSError):
            self._remember(RunDirectory(self._run_dir).config)
        save_recipe(self._recipe)

    def begin(self) -> None:
        """Records that the start is running (`ended` is "running"). After a restart of workers it is called again."""
        self._say(self._begin)

    def finish(self, summary: dict[str, Any]) -> None:
        """Records the end of the start: writes `summary`, which rank 0 returned, unless rank 0 has written it already."""
        self._say(lambda: None if has_figures(read(self._run_dir)) else write(self._run_dir, summary))

    def fail(self, failure: Failure) -> None:
        """Records that the start ended with `failure`, which includes a request to stop before the first step."""
        self._say(lambda: self._fail(failure))

    def refuse(self) -> None:
        """Restores both files as they were before the start, because the recipe was refused."""
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
        self._remember(RunDirectory(self._run_dir).summary)
        self.begun = True
        since = datetime.now().astimezone().isoformat("T", "seconds")
        write(self._run_dir, {"ended": "running", "since": since, **self._common()})

    def _fail(self, failure: Failure) -> None:
        ended = "stopped" if failure.kind == "stopped" else "failed"
        write(self._run_dir, {"ended": ended, "step": self._last_step(), "failure": failure.as_dict(), **self._common()})

    def _remember(self, path: Path) -> None:
        if path not in self._before:
            self._before[path] = path.read_bytes() if path.exists() else None

    def _restore(self) -> None:
        for path, content in self._before.items():
            if content is None:
                path.unlink(missing_ok=True)
            else:
                write_atomic(path, content)

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

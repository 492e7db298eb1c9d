"""Writes config.yaml, and the launcher's part of summary.json: that a start runs, and how it ended if no rank could write that."""

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from bagualu.comm.errors import RecipeError
from bagualu.launch.watch.watcher import Watcher
from bagualu.trainer.output.start import Start
from bagualu.trainer.process.failure import Failure
from bagualu.trainer.recipe.config import Recipe


class SummaryWatcher(Watcher):
    """Records the recipe in config.yaml, and in summary.json that a launch runs and how it ended. The node that holds the lock of
    the run directory writes; another node writes only after that node is lost."""

    def __init__(self, recipe: Recipe) -> None:
        self._start = Start(recipe)
        self._restarted = False

    def begins(self) -> None:
        self._start.save_recipe()
        self._start.begin()

    def started(self, generation: int, pids: Mapping[int, int]) -> None:
        if generation and self._start.begun:
            self._restarted = True
            self._start.begin()  # the failure may have come after the last step, when the summary already said "done"

    def ended(self, summary: dict[str, object] | None, failure: Failure | None) -> None:
        """Write how the launch ended: with `summary`, or with `failure`. After a refused recipe, before any step or restart, the
        files are restored instead. A node that does not hold the lock writes only failures, and only if the node with the lock is
        gone."""
        if failure is None:
            if summary and self._start.begun:
                self._start.finish(summary)
        elif not self._start.begun:
            if failure.kind not in ("recipe", "stopped"):
                self._start.fail_if_left(failure)
        elif failure.kind == "recipe" and not failure.step and not self._restarted:
            self._start.refuse()
        else:
            self._start.fail(failure)

    @contextmanager
    def crashing(self) -> Iterator[None]:
        """Inside this context, an exception that would end the launcher is raised again. If the start had begun, summary.json says
        that it failed; after a RecipeError, both files are again what they were before the start."""
        try:
            yield
        except BaseException as error:
            self._crashed(error)
            raise

    def _crashed(self, error: BaseException) -> None:
        if isinstance(error, RecipeError):
            self._start.refuse()
        elif self._start.begun:
            cause = f"{type(error).__name__}: {error}".rstrip(": ")
            self._start.fail(Failure(-1, "launch", cause, time.time()))

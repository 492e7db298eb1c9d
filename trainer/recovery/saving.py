"""Saves checkpoints during a run: a save begins at a step boundary, is written while training continues, and is committed at a
later step boundary.

All ranks call the methods of `Checkpoints` together, at step boundaries. The step's reduction tells each rank how many ranks are
still writing, and how many have failed.
"""

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from bagualu.comm.agree import any_rank
from bagualu.comm.errors import RecipeError
from bagualu.fault_tolerance.checkpoint.agree import on_all
from bagualu.fault_tolerance.checkpoint.layout.format import CheckpointError, CheckpointStorageError, SupersededError, step_of
from bagualu.fault_tolerance.checkpoint.saving.fence import Fence
from bagualu.fault_tolerance.checkpoint.saving.save import Saver, take_fence
from bagualu.fault_tolerance.checkpoint.saving.snapshot import Snapshot
from bagualu.fault_tolerance.ledger.events import Ledger
from bagualu.fault_tolerance.run_directory import BEGUN, RunDirectory
from bagualu.trainer.assemble import TrainerState
from bagualu.trainer.process.failure import FinalError
from bagualu.trainer.recovery.state import checkpoints_of, finite_pieces, metadata_of

log = logging.getLogger(__name__)
_AWAY_SECONDS = 2.0
"""The run's ownership is checked again only after a stall of this process this long; during a shorter stall it cannot have been
mistaken for a dead process."""


class LostRunError(CheckpointError, FinalError):
    """A later start has taken over the run and continues it."""


def take_checkpoints(state: TrainerState, scratch: Path | None = None) -> Fence:
    """Takes ownership of the run's checkpoints for this start; call it before reading them. Collective. `scratch` as in
    `trainer.run.train`.

    Raises on every rank if the checkpoints cannot be written: RecipeError for a run that begins, since a retry would fail again;
    CheckpointStorageError with checkpoint.resume=true, since the run could write there before and may again, and if the run
    directory cannot be read now.
    """
    group, mark = state.mesh.group("world"), scratch / BEGUN if scratch else None
    begun = on_all(lambda: (mark is not None and mark.exists()) or _has_begun(Path(state.recipe.run.dir)), group)
    try:
        fence = take_fence(checkpoints_of(state), group, _patience(state), any_rank(begun, group))
    except CheckpointError as error:
        if state.recipe.checkpoint.resume:
            raise CheckpointStorageError(str(error)) from error
        raise RecipeError(str(error)) from error
    if mark:
        mark.touch()
    return fence


def _has_begun(directory: Path) -> bool:
    try:
        return RunDirectory(directory).has_begun()
    except OSError as error:
        raise CheckpointStorageError(
            f"{directory} cannot be read now ({error.strerror}); see whether its storage is mounted and answers"
        ) from error


def _patience(state: TrainerState) -> float:
    """Returns the seconds for a rank's part of a save, or for its commit, after which the save has failed: by default half of
    comm.timeout_seconds, since the other ranks wait for both within the timeout of a communication."""
    return state.recipe.checkpoint.timeout_seconds or state.recipe.comm.timeout_seconds / 2


class Checkpoints:
    """Saves checkpoints, at most one at a time. A save that fails in the background is logged; a failure of the last save fails the
    run."""

    def __init__(self, state: TrainerState, fence: Fence, newest: Path | None = None, ledger: Ledger | None = None) -> None:
        """`newest`: the newest checkpoint of the run so far, None if there is none. `ledger`: records every commit; None on ranks
        without a ledger."""
        config = state.recipe.checkpoint
        self.state, self.asynchronous, self.newest = state, config.asynchronous, newest
        """`newest`: the newest committed checkpoint of this run; at first `Resumed.checkpoint`; None if there is none."""
        self._ledger = ledger
        self._began = 0.0
        """When the latest save began, by the monotonic clock."""
        self.seconds = 0.0
        """Seconds for which training has stood still for checkpoints at step boundaries so far."""
        self.failed = 0
        """The number of saves that failed so far, except a failed last save, which fails the run."""
        self._reported_seconds = 0.0
        self._error: str | None = None
        self._snapshot = Snapshot()
        self._fence, self._seen = fence, time.monotonic()
        self._saver = Saver(fence, state.mesh.group("world"), config.keep, _patience(state))

    def status(self) -> tuple[float, float]:
        """Returns this rank's `Saver.status`: 1.0 or 0.0 for still writing, and for failed; to be summed in the step's
        reduction."""
        return self._saver.status()

    def still_ours(self) -> None:
        """Raises LostRunError if another start has taken the run while this process was stopped or cut off.

        Call it before writing the run's files. It checks storage only if the last call was more than _AWAY_SECONDS ago."""
        away, self._seen = time.monotonic() - self._seen, time.monotonic()
        if away > _AWAY_SECONDS:
            try:
                self._fence.check()
            except SupersededError as error:
                raise LostRunError(str(error)) from error
            except CheckpointStorageError as error:  # no start can take the run while its storage is unavailable
                log.debug("%s", error)

    def settle(self, saving: tuple[float, float]) -> None:
        """Advances the save in progress, if any, after a step, given `status` summed over all ranks: while a rank is still writing,
        does nothing; if every part is durable, commits the save, in two calls; if the save failed, logs that and gives it up."""
        writing, failed = saving
        if self._saver.under_way and (failed or not writing):
            with self._timed():
                self._attempt(lambda: self._saver.advance(wait=not failed))

    def save(self, step: int) -> None:
        """Saves the state after `step` steps: with checkpoint.async in the background, else before it returns. Waits first for a
        save that is still in progress. A failure is logged, not raised."""
        with self._timed():
            self.finish()
            self._began = time.monotonic()
            if self.asynchronous:
                pieces = finite_pieces(self._snapshot.take(self.state.engine.pieces()))
                self._saver.start(step, pieces, metadata_of(self.state, step))
            else:
                self._saver.start(step, finite_pieces(self.state.engine.pieces()), metadata_of(self.state, step))
                self.finish()

    def save_last(self, step: int) -> None:
        """Saves the state after `step` steps, the last of the run. Raises on every rank if any rank failed.

        After CheckpointStorageError the launcher restarts the run, and does not count that as a crash loop. After LostRunError it
        does not, because a restart would take the run back from its present owner. Other errors are CheckpointError.
        """
        with self._timed():
            self.finish()
            self._began = time.monotonic()
            self._saver.start(step, finite_pieces(self.state.engine.pieces()), metadata_of(self.state, step))
            try:
                self._committed(self._saver.conclude())
            except SupersededError as error:
                raise LostRunError(str(error)) from error

    def finish(self) -> None:
        """Waits for the save in progress, if any, to be committed or to fail; a failure is logged."""
        if self._saver.under_way:
            self._attempt(self._saver.conclude)

    def rest(self) -> None:
        """Waits until this rank no longer changes the checkpoints: for the save in progress and for the removal of old
        checkpoints."""
        self.finish()
        self._saver.rest()

    def close(self, wait: bool = True) -> None:
        """Ends saving. With `wait`, waits until the writer has removed old checkpoints; a rank that has failed does not wait."""
        self._saver.close(wait)

    def record(self) -> dict[str, Any]:
        """Returns the fields of metrics.jsonl about checkpoints since the last call: the seconds for which training stood still for
        them, and the error if a save failed."""
        seconds, error = self.seconds - self._reported_seconds, self._error
        self._reported_seconds, self._error = self.seconds, None
        return {"checkpoint_seconds": seconds, **({"checkpoint_error": error} if error else {})}

    def _attempt(self, further: Callable[[], Path | None]) -> None:
        """Calls `further`, which advances the save in progress and returns the checkpoint once it is committed. If it raises
        CheckpointError, counts and logs that; the save is given up."""
        try:
            if path := further():
                self._committed(path)
        except CheckpointError as error:
            self.failed, self._error = self.failed + 1, str(error)
            if self.state.mesh.at("world") == 0:
                log.warning("%s; training goes on", error)

    def _committed(self, checkpoint: Path) -> None:
        self.newest = checkpoint
        if self._ledger is not None:
            self._ledger.add("saved", step_of(checkpoint) or 0, seconds=round(time.monotonic() - self._began, 3))

    @contextmanager
    def _timed(self) -> Iterator[None]:
        started = time.perf_counter()
        try:
            yield
        finally:
            self.seconds += time.perf_counter() - started

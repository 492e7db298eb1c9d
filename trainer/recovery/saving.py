"""The saves of a run: begun at one step boundary, written while training goes on, committed at a later one.

Every rank calls these methods alike, at step boundaries: what a rank knows of the others' writers it has from the step's reduction.
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
"""Whoever has been declared dead was silent for longer."""


class LostRunError(CheckpointError, FinalError):
    """A later start has the run, and goes on with it."""


def take_checkpoints(state: TrainerState, scratch: Path | None = None) -> Fence:
    """Make the run's checkpoints this start's own. Collective; before anything is read there. `scratch` as in `trainer.run.train`.

    Raises on every rank: RecipeError where a run begins, which would only be refused again; CheckpointStorageError where it goes
    on, since it could write there before, and can when there is room again.
    """
    group, mark = state.mesh.group("world"), scratch / BEGUN if scratch else None
    here = on_all(lambda: (mark is not None and mark.exists()) or _has_begun(Path(state.recipe.run.dir)), group)
    try:
        fence = take_fence(checkpoints_of(state), group, _patience(state), any_rank(here, group))
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
    """Seconds after which storage has failed. Others wait for one rank's part and then for the commit, in one communication."""
    return state.recipe.checkpoint.timeout_seconds or state.recipe.comm.timeout_seconds / 2


class Checkpoints:
    """At most one save is under way. One that fails in the background costs a warning, the last one fails the run."""

    def __init__(self, state: TrainerState, fence: Fence, newest: Path | None = None, ledger: Ledger | None = None) -> None:
        """`newest`: as the attribute. `ledger`: where each commit is entered, on the rank that has one."""
        config = state.recipe.checkpoint
        self.state, self.asynchronous, self.newest = state, config.asynchronous, newest
        """`newest`: the newest checkpoint of this run; at first the one it was resumed from."""
        self._ledger = ledger
        self._began = 0.0
        """When the newest save began, by the monotonic clock."""
        self.seconds = 0.0
        """Time that step boundaries have taken for checkpoints so far."""
        self.failed = 0
        self._reported_seconds = 0.0
        self._error: str | None = None
        self._snapshot = Snapshot()
        self._fence, self._seen = fence, time.monotonic()
        self._saver = Saver(fence, state.mesh.group("world"), config.keep, _patience(state))

    def status(self) -> tuple[float, float]:
        """For the step's reduction: as `Saver.status`."""
        return self._saver.status()

    def still_ours(self) -> None:
        """To be asked before the run's files are written. Raises LostRunError when this process was away, stopped or cut off, and
        meanwhile another start has taken the run. Costs nothing while steps are quick."""
        away, self._seen = time.monotonic() - self._seen, time.monotonic()
        if away > _AWAY_SECONDS:
            try:
                self._fence.check()
            except SupersededError as error:
                raise LostRunError(str(error)) from error
            except CheckpointStorageError as error:  # nobody can take the run while its storage is away
                log.debug("%s", error)

    def settle(self, saving: tuple[float, float]) -> None:
        """After a step, with `status` summed over all ranks: commit what is durable, report what has failed."""
        writing, failed = saving
        if self._saver.under_way and (failed or not writing):
            with self._timed():
                self._attempt(lambda: self._saver.advance(wait=not failed))

    def save(self, step: int) -> None:
        """Save the state after `step` steps, if possible in the background; one that is still under way is waited for."""
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
        """Save the state after `step` steps, the run's last. Raises on every rank when any rank failed.

        CheckpointStorageError is tried again as long as there are restarts, and no crash loop of the step. After LostRunError there
        is no restart, which would take the run from whoever has it now. All else is a CheckpointError.
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
        """Wait for the save under way, if any: afterwards `newest` is as new as it gets."""
        if self._saver.under_way:
            self._attempt(self._saver.conclude)

    def rest(self) -> None:
        """Wait until nothing changes in the run's checkpoints any more, by `finish` and by the removal of old ones."""
        self.finish()
        self._saver.rest()

    def close(self, wait: bool = True) -> None:
        """Nothing is saved after it. `wait`: for the writer to remove old checkpoints; a rank that has failed does not."""
        self._saver.close(wait)

    def record(self) -> dict[str, Any]:
        """What happened since the last record, for metrics.jsonl."""
        seconds, error = self.seconds - self._reported_seconds, self._error
        self._reported_seconds, self._error = self.seconds, None
        return {"checkpoint_seconds": seconds, **({"checkpoint_error": error} if error else {})}

    def _attempt(self, further: Callable[[], Path | None]) -> None:
        """Bring the save under way further; should it fail, say so and go on without it."""
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

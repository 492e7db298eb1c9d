"""Resumes a run from the newest state that is undamaged for every rank, and reports damaged states.

Candidates are tried newest first. All ranks read and verify a candidate before the run's state changes (state.py); if a rank
detects damage, all ranks try the next. A state that cannot be read *now* is not damaged: reading is tried again after growing
pauses, and if no state can be read, the run fails as on a full disk, with nothing changed, and the launcher restarts it.

A damaged checkpoint newer than the resumed state is renamed, never deleted. Under its old name it would block the save of the same
step later (a committed step is never overwritten), it would be tried first, in vain, at every restart, and retention would have to
treat it specially. `mv` undoes the renaming.
"""

import contextlib
import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Protocol, TypeVar

from bagualu.comm.agree import any_rank, first_different
from bagualu.comm.errors import RecipeError
from bagualu.comm.objects import broadcast_json
from bagualu.fault_tolerance.checkpoint.agree import on_all
from bagualu.fault_tolerance.checkpoint.layout.directory import list_checkpoints
from bagualu.fault_tolerance.checkpoint.layout.format import CheckpointError, CheckpointStorageError, step_of
from bagualu.fault_tolerance.checkpoint.layout.quarantine import set_aside
from bagualu.fault_tolerance.checkpoint.reading.load import Checkpoint
from bagualu.fault_tolerance.checkpoint.saving.fence import EPOCH
from bagualu.trainer.assemble import TrainerState
from bagualu.trainer.process.failure import FinalError
from bagualu.trainer.recovery.state import checkpoints_of, take_state

T = TypeVar("T")
_POLL_SECONDS = 1.0
log = logging.getLogger(__name__)


class Candidate(Protocol):
    """A state from which a run may resume. Every rank has the same candidates, by step and name, wherever they are stored."""

    @property
    def step(self) -> int: ...

    @property
    def name(self) -> str:
        """The name for messages and for comparing ranks, e.g. "step-00000010" or "replica of step 12"."""
        ...

    def open(self) -> Checkpoint:
        """Opens the state for reading. Called on every rank, so it may be collective. If it raises CheckpointError, the next
        candidate is tried."""
        ...


@dataclass(frozen=True)
class Stored:
    """A committed checkpoint in the run directory."""

    path: Path

    @property
    def step(self) -> int:
        step = step_of(self.path)
        assert step is not None
        return step

    @property
    def name(self) -> str:
        return self.path.name

    def open(self) -> Checkpoint:
        return Checkpoint(self.path)


class NothingWholeError(CheckpointError, FinalError):
    """All states are damaged. Every restart would fail the same way, so the run is not restarted."""


@dataclass(frozen=True)
class Resumed:
    """The state from which the run resumed."""

    step: int = 0
    """Steps already done."""
    checkpoint: Path | None = None
    """The newest checkpoint of the run directory that no rank found damaged or unreadable; None if there is none."""
    source: str | None = None
    """The name of the candidate that was used; None if the run begins."""
    damaged: list[dict[str, Any]] = field(default_factory=list)
    """The candidates that could not be used, newest first, each as {"checkpoint": its name, "problem": rank, file and byte, "used":
    the candidate used instead, "set_aside": its new name or null}."""


def resume(state: TrainerState, others: Sequence[Candidate] = (), stop: Callable[[], bool] = lambda: False) -> Resumed:
    """Restores the newest undamaged state and describes it. Without a state to resume from, or if the recipe does not ask to
    resume, changes nothing and returns `Resumed()`. Collective.

    `others` are candidates besides the checkpoints of the run directory, and are tried before a checkpoint of the same step.
    `stop`: whether this rank was asked to stop; it ends the wait for storage. Raises RecipeError if a rank has other data or
    another disk, or if the states are of another run, NothingWholeError if all states are damaged, and CheckpointStorageError if
    none can be used and some cannot be read now.
    """
    stored = list_stored(state, stop) if state.recipe.checkpoint.resume else []
    candidates = sorted([*others, *map(Stored, stored)], key=lambda candidate: -candidate.step)
    _require_same(state, candidates)
    if not candidates:
        return Resumed()
    chosen, problems = choose(state, candidates, stop)
    whole = [path for path in stored if path.name not in problems]
    newest = whole[-1] if whole else None
    return Resumed(chosen.step, newest, chosen.name, report_damaged(state, candidates, problems, chosen))


class _Patience:
    """Retries reads from storage that fail: at most four times, over all its calls together, after the pauses used before restarts,
    the same on all ranks."""

    def __init__(self, state: TrainerState, stop: Callable[[], bool]) -> None:
        self._group, self._stop = state.mesh.group("world"), stop
        self._speaks = state.mesh.at("world") == 0
        self._pauses = [state.recipe.restart.pause_seconds(number) for number in range(1, 5)]

    def __call__(self, attempt: Callable[[], T]) -> T:
        """Returns `attempt()`, which succeeds or fails on all ranks together. Raises its errors; CheckpointStorageError only after
        the last attempt or a request to stop."""
        while self._pauses:
            try:
                return attempt()
            except CheckpointStorageError as error:
                pause = self._pauses.pop(0)
                if self._speaks:
                    log.warning("%s. Trying again in %g s", error, pause)
                if self._stopped_in(pause):
                    raise
        return attempt()

    def _stopped_in(self, pause: float) -> bool:
        """Waits `pause` seconds and returns False; or returns True early if any rank is asked to stop meanwhile, because there is
        nothing to save. Collective."""
        while pause > 0:
            portion = min(pause, _POLL_SECONDS)
            time.sleep(portion)
            pause -= portion
            if any_rank(self._stop(), self._group):
                return True
        return False


def list_stored(state: TrainerState, stop: Callable[[], bool], patience: _Patience | None = None) -> list[Path]:
    """Returns the checkpoints of the run directory, oldest first. Collective. Raises CheckpointStorageError on every rank if rank 0
    cannot list them, or another rank does not see them, even after retries.

    Rank 0 lists them, because it creates the folder of a new run; on a node that listed it too early, cached results may be stale.
    """
    root, group = checkpoints_of(state), state.mesh.group("world")

    def attempt() -> list[Path]:
        listed = on_all(lambda: _list_here(root) if group.rank == 0 else [], group)
        named = [root / name for name in broadcast_json([path.name for path in listed], group)]
        on_all(lambda: _require_seen(named), group)
        return named

    return (patience or _Patience(state, stop))(attempt)


def _list_here(root: Path) -> list[Path]:
    try:
        (root / EPOCH).stat()  # if this fails, the folder is empty because its storage is not mounted
        return list_checkpoints(root)
    except OSError as error:
        raise CheckpointStorageError(f"{root} cannot be read now ({error.strerror}); see whether its storage is mounted") from error


def _require_seen(named: list[Path]) -> None:
    for path in named:
        try:
            seen, why = path.is_dir(), "is not seen here"
        except OSError as error:
            seen, why = False, f"cannot be read now ({error.strerror})"
        if not seen:
            raise CheckpointStorageError(f"{path} {why}; see whether run.dir is mounted, on a disk that all nodes share")


def choose(
    state: TrainerState, candidates: Sequence[Candidate], stop: Callable[[], bool]
) -> tuple[Candidate, dict[str, CheckpointError]]:
    """Restores the first candidate that is undamaged for every rank. Returns it, and by name the errors of the candidates before
    it.

    Collective. Raises, with nothing changed, CheckpointStorageError if no candidate can be used but some may be readable later, and
    NothingWholeError if all are damaged.
    """
    patience = _Patience(state, stop)
    problems: dict[str, CheckpointError] = {}
    for at, candidate in enumerate(candidates):
        try:
            patience(partial(take_state, state, candidate.open))
        except CheckpointError as error:
            problems[candidate.name] = error
        else:
            return _newest_after_all(state, candidates[: at + 1], problems)
    root = checkpoints_of(state)
    reasons = "; ".join(f"{name}: {_short(str(problem), root / name)}" for name, problem in problems.items())
    list_stored(state, stop, patience)  # if storage has gone altogether, this raises CheckpointStorageError: nothing is damaged
    if any(isinstance(problem, CheckpointStorageError) for problem in problems.values()):
        raise CheckpointStorageError(
            f"none of the {len(problems)} states of {state.recipe.run.dir} can be read now ({reasons}); nothing was changed, see "
            "whether its storage is mounted and answers"
        )
    raise NothingWholeError(
        f"none of the {len(problems)} states of {state.recipe.run.dir} can be used ({reasons}); restore one of them from a copy, "
        "or start anew with another run.dir"
    )


def _newest_after_all(
    state: TrainerState, candidates: Sequence[Candidate], problems: dict[str, CheckpointError]
) -> tuple[Candidate, dict[str, CheckpointError]]:
    """Tries again the candidates that could not be read from storage: the last of `candidates` was read, so storage works, perhaps
    again. Uses the first that can be read now, else the last of `candidates`, whose state is in use already.

    Returns as `choose` does."""
    for at, candidate in enumerate(candidates[:-1]):
        if isinstance(problems[candidate.name], CheckpointStorageError):
            with contextlib.suppress(CheckpointError):
                take_state(state, candidate.open)
                return candidate, {earlier.name: problems[earlier.name] for earlier in candidates[:at]}
    return candidates[-1], problems


def _short(problem: str, checkpoint: Path) -> str:
    """Returns the error message `problem` of a checkpoint without its path and without the remedy."""
    return problem.replace(f"{checkpoint}: ", "").replace(f"{checkpoint}/", "").split("; ")[0]


def _require_same(state: TrainerState, candidates: Sequence[Candidate]) -> None:
    """Raises RecipeError on every rank, naming the rank, if a rank reads other data or another disk than rank 0. Collective."""
    names = ", ".join(candidate.name for candidate in candidates) or "none"
    own = {"other data": state.corpus.fingerprint, "other checkpoints": names}
    if difference := first_different(own, state.mesh.group("world")):
        rank, theirs, first = difference
        what = next(what for what in own if theirs[what] != first[what])
        raise RecipeError(f"rank {rank} has {what} than rank 0 ({theirs[what]} and {first[what]}); give every rank the same "
                          f"data.source, Python version and a run.dir on a disk that all nodes share")  # fmt: skip


def report_damaged(
    state: TrainerState, candidates: Sequence[Candidate], problems: dict[str, CheckpointError], used: Candidate
) -> list[dict[str, Any]]:
    """Renames the damaged checkpoints, logs the problems on rank 0, and returns `Resumed.damaged`, the same on every rank.
    Collective.

    A checkpoint that could not be read counts as damaged if another checkpoint could, since they share their storage.
    """
    if not problems:
        return []
    entries = []
    if state.mesh.at("world") == 0:
        for candidate in candidates[: len(problems)]:
            problem = problems[candidate.name]
            damaged = isinstance(used, Stored) or not isinstance(problem, CheckpointStorageError)
            moved = _set_aside(candidate.path) if isinstance(candidate, Stored) and damaged else None
            log.warning("%s cannot be used: %s. Going on from %s", candidate.name, problem, used.name)
            if moved:
                log.warning("%s is now called %s", candidate.name, moved)
            entries.append({"checkpoint": candidate.name, "problem": str(problem), "used": used.name, "set_aside": moved})
    agreed: list[dict[str, Any]] = broadcast_json(entries, state.mesh.group("world"))
    return agreed


def _set_aside(path: Path) -> str | None:
    try:
        return set_aside(path).name
    except OSError as error:  # the run can continue; saving this step again will report the conflict
        log.warning("%s cannot be renamed (%s)", path, error.strerror)
        return None

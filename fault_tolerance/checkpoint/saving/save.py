"""Saving: every rank writes its part durably and reports to rank 0, which commits the checkpoint by a rename.

    main thread    start: snapshot ... training ...  advance: reports -> rank 0 ... training ...  advance: outcome <- rank 0
    writer thread        mkdir, fence, shard, fsync                    rank 0: manifest, rename           prune, look back

Before the rename there is nothing to load; after it the checkpoint is complete. A failure on any rank raises an error on every
rank. The main thread runs all collectives; the writer thread does all work on storage, so that no step waits for it.
"""

import contextlib
import logging
import os
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from bagualu.comm.group import Group
from bagualu.comm.monitor import Phase
from bagualu.comm.objects import broadcast_json, collect_json
from bagualu.fault_tolerance.checkpoint.layout.directory import SAVING, delete, doom, temporary_for
from bagualu.fault_tolerance.checkpoint.layout.format import CheckpointError, step_name
from bagualu.fault_tolerance.checkpoint.layout.shard import write_shard
from bagualu.fault_tolerance.checkpoint.saving.commit import Claim, commit, manifest_of
from bagualu.fault_tolerance.checkpoint.saving.fence import Fence
from bagualu.fault_tolerance.checkpoint.saving.retention import prune
from bagualu.fault_tolerance.checkpoint.saving.verify_written import LookBack
from bagualu.fault_tolerance.checkpoint.saving.writer import KINDS, Job, Outcome, Writer
from bagualu.parallel.boxes import TensorPiece

_TIMEOUT_SECONDS = 300.0
_REMEDY = "earlier checkpoints are as they were; repair this and save again"
T = TypeVar("T")
log = logging.getLogger(__name__)


@dataclass
class _Save:
    step: int
    metadata: dict[str, Any]
    temporary: Path
    job: Job | None
    """This rank's work until the next `advance`: first writing its part, then the commit on rank 0 and None on the others."""
    deadline: float
    """The time by which `job` must be done, on the clock time.monotonic()."""
    committing: bool = False
    """Whether every rank's part is durable, so that rank 0 commits; the same on every rank."""
    claim: Claim = field(default_factory=Claim)
    """Decides between committing and giving up. A commit that ends after this rank has given the save up undoes itself, so "not
    saved" stays true."""
    report: dict[str, Any] | None = None
    """What `write_shard` returned for this rank's part, with the damage found in earlier checkpoints; None until all parts are
    gathered."""
    failed: Outcome | None = None
    """The error because of which this rank has given up the save; None if it has not given it up."""


class Saver:
    """Saves checkpoints on a rank, one at a time. All ranks call `start`, `advance` and `conclude` together, on their main threads.

    If a rank's writing, or the commit, takes longer than `timeout_seconds`, the save fails. That time must be well below the
    group's timeout, because the other ranks wait in collectives meanwhile.
    """

    def __init__(
        self,
        fence: Fence,
        group: Group,
        keep: int,
        timeout_seconds: float = _TIMEOUT_SECONDS,
    ) -> None:
        if keep < 1:
            raise ValueError(f"Saver: keep={keep} must be at least 1")
        self.fence, self.group, self.keep, self.timeout_seconds = fence, group, keep, timeout_seconds
        self._writer = Writer(group.ranks[group.rank])
        self._under_way: _Save | None = None
        self._attempts = 0
        self._look_back = LookBack(keep)
        self._looks_back = False
        """Whether the next call of `status` without a save in progress shall verify an earlier checkpoint. So none is verified
        after the last save."""
        self._damaged: set[str] = set()
        """Names of checkpoints of which any rank has found its own shard damaged; filled only on rank 0."""

    @property
    def under_way(self) -> bool:
        """Whether a save has been started and is neither committed nor given up; the same on every rank."""
        return self._under_way is not None

    def status(self) -> tuple[float, float]:
        """Returns (1.0 while this rank's writer thread works on the save in progress, else 0.0; 1.0 if that work has failed, else
        0.0). Without a save in progress, it may begin to verify an earlier checkpoint.

        Sum both over the ranks. If the first sum is 0 or the second is greater than 0, `advance` does not have to wait.
        """
        if self._under_way is None:
            if self._looks_back:
                self._looks_back = False
                self._writer.submit(self._look_back.check)
            return 0.0, 0.0
        outcome = self._outcome(self._under_way)
        return float(outcome is None), float(outcome is not None and "error" in outcome)

    def start(self, step: int, pieces: Iterable[TensorPiece], metadata: dict[str, Any]) -> None:
        """Begins to save `step` and returns immediately. The tensors of `pieces` must not change before all parts are written.
        Training may go on if they are copies that a Snapshot made.

        The pieces of all ranks together hold every element of every tensor exactly once. `metadata` is plain JSON; only that of
        position 0 is written. A committed checkpoint is never changed: the save fails if `step` has one already.
        """
        if self._under_way is not None:
            raise ValueError(f"step {self._under_way.step} is still being saved; conclude it first")
        self._attempts += 1
        root = self.fence.root
        temporary = temporary_for(root, step, f"{self.fence.token}-{self._attempts}")
        self.group.monitor.at(Phase.WRITE)
        part = self._writer.submit(self._fenced, self._write_part, temporary, root / step_name(step), pieces)
        self._under_way = _Save(step, metadata, temporary, part, self._deadline())

    def conclude(self) -> Path:
        """Waits for the save in progress, commits it and returns the path of the checkpoint. Collective. Raises the errors of
        `advance`."""
        while (path := self.advance()) is None:
            pass
        return path

    def advance(self, wait: bool = True) -> Path | None:
        """Advances the save in progress. The first call returns None when rank 0 begins to commit; the second waits for the commit
        and returns the checkpoint's path. Collective.

        Use wait=False when `status` has shown that a rank failed; then the first call does not wait for parts that are still being
        written. If any rank failed, it raises on every rank: SupersededError if any rank saw a later start; CheckpointStorageError
        if only storage has failed; else CheckpointError. The save is then given up, and the earlier checkpoints are unchanged.
        """
        save = self._under_way
        assert save is not None
        self._under_way = None
        self.group.monitor.at(Phase.WRITE)
        verdict = self._committed(save) if save.committing else self._all_durable(save, wait)
        if "error" in verdict:
            if self.group.rank == 0:
                self._writer.submit(_remove_quietly, save.temporary)
            raise KINDS[verdict["kind"]](f"step {save.step} was not saved: {verdict['error']}; {_REMEDY}")
        if not save.committing:
            save.committing, self._under_way = True, save
            return None
        final = self.fence.root / step_name(save.step)
        self.group.monitor.at(Phase.PRUNE)
        if self.group.rank == 0:
            self._writer.submit(self._prune, final)
        assert save.report is not None
        self._look_back.wrote(final, save.report)
        self._looks_back = True
        return final

    def rest(self) -> None:
        """Waits, at most `timeout_seconds`, until this rank's writer thread has finished its work, e.g. removing old
        checkpoints."""
        self._writer.rest(self.timeout_seconds)

    def close(self, wait: bool = True) -> None:
        """Ends saving. With `wait`, waits, at most `timeout_seconds`, until the writer thread has finished its work, e.g. removing
        old checkpoints."""
        self._writer.close(self.timeout_seconds if wait else 0)

    def _deadline(self) -> float:
        return time.monotonic() + self.timeout_seconds

    def _outcome(self, save: _Save, wait: bool = False) -> Outcome | None:
        """Returns the outcome of this rank's job; None if it is still running before its deadline and `wait` is false. An error
        gives the save up, unless the commit came first."""
        if save.job is None:
            return {"done": None}
        left = save.deadline - time.monotonic()
        outcome = save.failed or (save.job.wait(left) if wait or left < 0 else save.job.outcome)
        if outcome and "error" in outcome:
            if not save.claim.give_up():  # it was committed at the last moment
                return {"done": None}
            save.failed = outcome
        return outcome

    def _all_durable(self, save: _Save, wait: bool) -> Outcome:
        """Reports this rank's part to rank 0, which starts the commit if all parts are durable. Returns {"done": None} or an error,
        the same on every rank."""
        own = self._outcome(save, wait)
        save.report = own.get("done") if own else None
        self.group.monitor.at(Phase.COMMIT)
        outcomes = collect_json(own, self.group)
        verdict: Outcome = {"done": None}
        save.job = None
        if outcomes is not None:
            errors = [(rank, o) for rank, o in zip(self.group.ranks, outcomes, strict=True) if o and "error" in o]
            if errors:
                rank, worst = min(errors, key=lambda error: list(KINDS).index(error[1]["kind"]))
                more = f" (and {len(errors) - 1} more ranks)" if len(errors) > 1 else ""
                verdict = {**worst, "error": f"rank {rank}{more}: {worst['error']}"}
            else:
                save.job = self._writer.submit(self._fenced, self._commit, save, [o["done"] for o in outcomes if o])
                save.deadline = self._deadline()
        shared: Outcome = broadcast_json(verdict, self.group)
        return shared

    def _committed(self, save: _Save) -> Outcome:
        """Waits for rank 0's commit and returns its outcome on every rank. Collective."""
        own = self._outcome(save, wait=True)
        if own and "error" in own:
            own = {**own, "error": f"rank {self.group.ranks[0]}: {own['error']}"}
        shared: Outcome = broadcast_json(own, self.group)
        return shared

    def _fenced(self, job: Callable[..., T], *args: Any) -> T:
        """Runs `job` in the writer thread and returns its result. If it raises OSError and a later start has taken the fence (and
        so removed its files), raises SupersededError instead."""
        try:
            return job(*args)
        except OSError:
            self.fence.check()
            raise

    def _write_part(self, temporary: Path, final: Path, pieces: Iterable[TensorPiece]) -> dict[str, Any]:
        """Runs in the writer thread: writes this rank's shard durably and returns the report on it. The directory must be created
        before the fence is checked (fence.py)."""
        temporary.mkdir(exist_ok=True)
        try:
            self.fence.check()
        except CheckpointError:
            with contextlib.suppress(OSError):  # rank 0's removal, for the rank that failed first, may have come earlier
                temporary.rmdir()
            raise
        if self.group.rank == 0:
            _clear_failed(temporary, self.fence)
            if os.path.lexists(final):
                raise CheckpointError(f"{final} is there already and never overwritten; resume from it or remove it first")
        report = write_shard(temporary / f"rank-{self.group.ranks[self.group.rank]:05d}.safetensors", pieces)
        return {**report, "damaged": dict(self._look_back.damaged)}

    def _commit(self, save: _Save, reports: list[dict[str, Any]]) -> None:
        manifest = manifest_of(save.step, save.metadata, self.group.ranks, reports)
        self._note_damage(reports)
        commit(self.fence, save.temporary, self.fence.root / step_name(save.step), manifest, save.claim)

    def _note_damage(self, reports: list[dict[str, Any]]) -> None:
        """Records the checkpoints in which ranks have found their own shards damaged, as their reports say, and logs those not
        recorded before."""
        damaged: set[str] = set()
        for rank, report in zip(self.group.ranks, reports, strict=True):
            for name, why in report["damaged"].items():
                if name not in self._damaged | damaged:
                    log.warning("rank %d: %s; it does not count towards checkpoint.keep=%d", rank, why, self.keep)
                damaged.add(name)
        self._damaged = damaged

    def _prune(self, just_saved: Path) -> None:
        """Removes old checkpoints (see `prune`). The new checkpoint is committed already, so a failure to remove others is only
        logged."""
        try:
            self.fence.check()
            prune(self.fence.root, self.keep, just_saved, self._damaged)
        except CheckpointError as error:
            log.warning("checkpoint.keep=%d: %s", self.keep, error)


def take_fence(root: Path, group: Group, timeout_seconds: float = _TIMEOUT_SECONDS, begun: bool = False) -> Fence:
    """Takes the fence of `root` on position 0 and returns it on all ranks of `group`. `begun` says whether the run has already
    taken a fence there; only the value on position 0 is used.

    Collective. Raises CheckpointError on every rank if that fails or takes longer than `timeout_seconds`.
    """
    verdict = None
    if group.rank == 0:
        writer = Writer(group.ranks[0])
        taken = writer.submit(Fence.take, root, begun).wait(timeout_seconds)
        writer.close(0)
        verdict = {"done": [taken["done"].epoch, taken["done"].token]} if "done" in taken else taken
    verdict = broadcast_json(verdict, group)
    if "error" in verdict:
        raise CheckpointError(f"{root} cannot be written: {verdict['error']}; make it writable or give another run.dir")
    return Fence(root, *verdict["done"])


def save(
    root: Path,
    step: int,
    pieces: Iterable[TensorPiece],
    metadata: dict[str, Any],
    group: Group,
    keep: int,
) -> Path:
    """Writes a single checkpoint of `step` under `root` and returns its path. Collective over `group`.

    This takes the fence, so a process that was saving under `root` can no longer commit. See `Saver.start` and `Saver.conclude`.
    """
    saver = Saver(take_fence(root, group), group, keep)
    try:
        saver.start(step, pieces, metadata)
        return saver.conclude()
    finally:
        saver.close()


def _clear_failed(temporary: Path, fence: Fence) -> None:
    """Removes the directories that earlier, failed saves of this start have left, but not `temporary`, that of the present save.
    Raises OSError."""
    for path in list(fence.root.glob(f"{SAVING}*-{fence.token}-*")):
        if path != temporary:
            delete(doom(path))


def _remove_quietly(temporary: Path) -> None:
    """Removes the files of a failed save without raising an error. The next save or start removes those that remain."""
    doomed = temporary
    with contextlib.suppress(OSError):
        doomed = doom(temporary)
    delete(doomed)

"""Saving: every rank makes its part durable, all tell rank 0 how it went, rank 0 commits by one rename.

    main thread    start: snapshot ... training ...  advance: reports -> rank 0 ... training ...  advance: outcome <- rank 0
    writer thread        mkdir, fence, shard, fsync                    rank 0: manifest, rename           prune, look back

Until the rename nothing is there to load; after it everything is. A failure anywhere is raised on every rank. The collectives are
all on the main thread; whatever touches the storage is in the writer thread, so that no step waits for it.
"""

import contextlib
import logging
import os
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import torch

from bagualu.comm.group import Group
from bagualu.fault_tolerance.checkpoint.commit import Claim, commit, manifest_of
from bagualu.fault_tolerance.checkpoint.directory import SAVING, delete, doom, temporary_for
from bagualu.fault_tolerance.checkpoint.exchange import broadcast_json, collect_json
from bagualu.fault_tolerance.checkpoint.fence import Fence
from bagualu.fault_tolerance.checkpoint.format import CheckpointError, step_name
from bagualu.fault_tolerance.checkpoint.lookback import LookBack
from bagualu.fault_tolerance.checkpoint.retention import prune
from bagualu.fault_tolerance.checkpoint.shard import Piece, write_shard
from bagualu.fault_tolerance.checkpoint.writer import KINDS, Job, Outcome, Writer

_HOST = torch.device("cpu")
_TIMEOUT_SECONDS = 300.0
_REMEDY = "earlier checkpoints are as they were; repair this and save again"
T = TypeVar("T")
log = logging.getLogger(__name__)


@dataclass
class _UnderWay:
    step: int
    metadata: dict[str, Any]
    temporary: Path
    job: Job | None
    """What this rank has to do before the next `advance`: its part, then on rank 0 the commit."""
    deadline: float
    """Monotonic time by which it must be done."""
    committing: bool = False
    """Every part is durable; the same on every rank."""
    claim: Claim = field(default_factory=Claim)
    """What was told of a failed save stays true: a commit that ends well after that takes itself back."""
    report: dict[str, Any] | None = None
    """Of this rank's part, once it is durable."""
    failed: Outcome | None = None
    """Why this rank has given it up."""


class Saver:
    """One rank's saves, one at a time. Every rank calls `start`, `advance` and `conclude` alike, on its main thread.

    `device`: where the group's collectives want their tensors. `timeout_seconds`: storage that has not answered for so long has
    failed; it must be well below the timeout of the group, in which the other ranks wait.
    """

    def __init__(
        self,
        fence: Fence,
        group: Group,
        keep: int,
        device: torch.device = _HOST,
        timeout_seconds: float = _TIMEOUT_SECONDS,
    ) -> None:
        if keep < 1:
            raise ValueError(f"Saver: keep={keep} must be at least 1")
        self.fence, self.group, self.keep, self.device, self.timeout_seconds = fence, group, keep, device, timeout_seconds
        self._writer = Writer(group.ranks[group.rank])
        self._under_way: _UnderWay | None = None
        self._attempts = 0
        self._look_back = LookBack(keep)
        self._looks_back = False
        """It has something to read, once training goes on; after the last save nobody waits for it."""
        self._damaged: set[str] = set()
        """On rank 0: names of checkpoints that some rank has found damaged."""

    @property
    def under_way(self) -> bool:
        """Whether a save has been started and not concluded; the same on every rank."""
        return self._under_way is not None

    def status(self) -> tuple[float, float]:
        """(1.0 while this rank's writer has something to do for the save under way, 1.0 when that has failed): to be added up over
        the ranks. When the first sum is 0 or the second is not, `advance` does not have to wait.
        """
        if self._under_way is None:
            if self._looks_back:
                self._looks_back = False
                self._writer.submit(self._look_back.check)
            return 0.0, 0.0
        outcome = self._outcome(self._under_way)
        return float(outcome is None), float(outcome is not None and "error" in outcome)

    def start(self, step: int, pieces: Iterable[Piece], metadata: dict[str, Any]) -> None:
        """Begin to save `step`; returns at once. The tensors must not change before `conclude` (or be a Snapshot's).

        The pieces of all ranks together hold every element of every tensor exactly once. `metadata` is plain JSON; that of
        position 0 is written. A committed checkpoint is immutable: a step that is there already is refused.
        """
        if self._under_way is not None:
            raise ValueError(f"step {self._under_way.step} is still being saved; conclude it first")
        self._attempts += 1
        root = self.fence.root
        temporary = temporary_for(root, step, f"{self.fence.token}-{self._attempts}")
        self.group.monitor.at("write")
        part = self._writer.submit(self._fenced, self._write_part, temporary, root / step_name(step), pieces)
        self._under_way = _UnderWay(step, metadata, temporary, part, self._deadline())

    def conclude(self) -> Path:
        """Wait for the save under way and commit it; its path. Collective. Raises as `advance`."""
        while (path := self.advance()) is None:
            pass
        return path

    def advance(self, wait: bool = True) -> Path | None:
        """Bring the save under way one stage further: None when rank 0 now commits it, its path when that is done. Collective.

        wait=False, after `status` has said that some rank failed, does not wait for parts that are still being written.
        Raises on every rank when any rank failed: SupersededError, CheckpointStorageError where the storage is all that is wrong,
        else CheckpointError; then the save is given up, nothing new is there and the earlier
        checkpoints are as they were.
        """
        save = self._under_way
        assert save is not None
        self._under_way = None
        self.group.monitor.at("write")
        verdict = self._committed(save) if save.committing else self._all_durable(save, wait)
        if "error" in verdict:
            if self.group.rank == 0:
                self._writer.submit(_remove_quietly, save.temporary)
            raise KINDS[verdict["kind"]](f"step {save.step} was not saved: {verdict['error']}; {_REMEDY}")
        if not save.committing:
            save.committing, self._under_way = True, save
            return None
        final = self.fence.root / step_name(save.step)
        self.group.monitor.at("prune")
        if self.group.rank == 0:
            self._writer.submit(self._prune, final)
        assert save.report is not None
        self._look_back.wrote(final, save.report)
        self._looks_back = True
        return final

    def rest(self) -> None:
        """Wait until no old checkpoint is being removed any more by this rank."""
        self._writer.rest(self.timeout_seconds)

    def close(self, wait: bool = True) -> None:
        """Nothing is saved after it. `wait`: for the writer to finish what it does; old checkpoints are removed after a commit."""
        self._writer.close(self.timeout_seconds if wait else 0)

    def _deadline(self) -> float:
        return time.monotonic() + self.timeout_seconds

    def _outcome(self, save: _UnderWay, wait: bool = False) -> Outcome | None:
        """What has become of this rank's job; None while it has time left, unless told to wait."""
        if save.job is None:
            return {"done": None}
        left = save.deadline - time.monotonic()
        outcome = save.failed or (save.job.wait(left) if wait or left < 0 else save.job.outcome)
        if outcome and "error" in outcome:
            if not save.claim.give_up():  # at the last moment after all
                return {"done": None}
            save.failed = outcome
        return outcome

    def _all_durable(self, save: _UnderWay, wait: bool) -> Outcome:
        """Tell rank 0 of this rank's part; its verdict. If all are durable, it begins to commit."""
        own = self._outcome(save, wait)
        save.report = own.get("done") if own else None
        self.group.monitor.at("commit")
        outcomes = collect_json(own, self.group, self.device)
        verdict: Outcome = {"done": None}
        save.job = None
        if outcomes is not None:
            errors = [(rank, o) for rank, o in zip(self.group.ranks, outcomes, strict=True) if o and "error" in o]
            if errors:
                rank, worst = min(errors, key=lambda one: list(KINDS).index(one[1]["kind"]))
                more = f" (and {len(errors) - 1} more ranks)" if len(errors) > 1 else ""
                verdict = {**worst, "error": f"rank {rank}{more}: {worst['error']}"}
            else:
                save.job = self._writer.submit(self._fenced, self._commit, save, [o["done"] for o in outcomes if o])
                save.deadline = self._deadline()
        told: Outcome = broadcast_json(verdict, self.group, self.device)
        return told

    def _committed(self, save: _UnderWay) -> Outcome:
        """Rank 0's verdict on its commit."""
        own = self._outcome(save, wait=True)
        if own and "error" in own:
            own = {**own, "error": f"rank {self.group.ranks[0]}: {own['error']}"}
        told: Outcome = broadcast_json(own, self.group, self.device)
        return told

    def _fenced(self, job: Callable[..., T], *args: Any) -> T:
        """In the writer thread. A later start sets aside what this one writes: such an error is not the storage's."""
        try:
            return job(*args)
        except OSError:
            self.fence.check()
            raise

    def _write_part(self, temporary: Path, final: Path, pieces: Iterable[Piece]) -> dict[str, Any]:
        """In the writer thread: this rank's shard, durable; its report. The order of the first two lines is the fence."""
        temporary.mkdir(exist_ok=True)
        try:
            self.fence.check()
        except CheckpointError:
            with contextlib.suppress(OSError):  # rank 0 removes it once, for whoever failed first: that may have been before
                temporary.rmdir()
            raise
        if self.group.rank == 0:
            _clear_failed(temporary, self.fence)
            if os.path.lexists(final):
                raise CheckpointError(f"{final} is there already and never overwritten; resume from it or remove it first")
        report = write_shard(temporary / f"rank-{self.group.ranks[self.group.rank]:05d}.safetensors", pieces)
        return {**report, "damaged": dict(self._look_back.damaged)}

    def _commit(self, save: _UnderWay, reports: list[dict[str, Any]]) -> None:
        manifest = manifest_of(save.step, save.metadata, self.group.ranks, reports)
        self._note_damage(reports)
        commit(self.fence, save.temporary, self.fence.root / step_name(save.step), manifest, save.claim)

    def _note_damage(self, reports: list[dict[str, Any]]) -> None:
        """What the ranks found when they read again what they had written."""
        found: set[str] = set()
        for rank, report in zip(self.group.ranks, reports, strict=True):
            for name, why in report["damaged"].items():
                if name not in self._damaged | found:
                    log.warning("rank %d: %s; it does not count towards checkpoint.keep=%d", rank, why, self.keep)
                found.add(name)
        self._damaged = found

    def _prune(self, just_saved: Path) -> None:
        """The checkpoint is committed: that an old one cannot be removed is no reason to call the save failed."""
        try:
            self.fence.check()
            prune(self.fence.root, self.keep, just_saved, self._damaged)
        except CheckpointError as error:
            log.warning("checkpoint.keep=%d: %s", self.keep, error)


def take_fence(
    root: Path, group: Group, device: torch.device = _HOST, timeout_seconds: float = _TIMEOUT_SECONDS, begun: bool = False
) -> Fence:
    """The fence of `root` for all ranks of `group`, taken by position 0; `begun`, as it sees it: the run has been there before.

    Collective. Raises CheckpointError on every rank.
    """
    verdict = None
    if group.rank == 0:
        writer = Writer(group.ranks[0])
        taken = writer.submit(Fence.take, root, begun).wait(timeout_seconds)
        writer.close(0)
        verdict = {"done": [taken["done"].epoch, taken["done"].token]} if "done" in taken else taken
    verdict = broadcast_json(verdict, group, device)
    if "error" in verdict:
        raise CheckpointError(f"{root} cannot be written: {verdict['error']}; make it writable or give another run.dir")
    return Fence(root, *verdict["done"])


def save(
    root: Path,
    step: int,
    pieces: Iterable[Piece],
    metadata: dict[str, Any],
    group: Group,
    keep: int,
    device: torch.device = _HOST,
) -> Path:
    """Write a checkpoint of `step` under `root`, by itself, and return its path. Collective over `group`.

    It is a start of its own: it takes the fence from whoever saves there. Otherwise as `Saver.start` and `Saver.conclude`.
    """
    saver = Saver(take_fence(root, group, device), group, keep, device)
    try:
        saver.start(step, pieces, metadata)
        return saver.conclude()
    finally:
        saver.close()


def _clear_failed(temporary: Path, fence: Fence) -> None:
    """Remove what failed saves of this start have left, but not `temporary`. Raises OSError."""
    for path in list(fence.root.glob(f"{SAVING}*-{fence.token}-*")):
        if path != temporary:
            delete(doom(path))


def _remove_quietly(temporary: Path) -> None:
    """What is left of a failed save; what cannot be removed now is removed by the next one."""
    doomed = temporary
    with contextlib.suppress(OSError):
        doomed = doom(temporary)
    delete(doomed)

"""Saving: every rank makes its part durable, all tell rank 0 how it went, rank 0 commits by one rename.

    main thread    start: snapshot .... training goes on ....  conclude: reports -> rank 0,      outcome <- rank 0
    writer thread        mkdir, fence, shard, fsync                      rank 0: manifest, rename        prune

Until the rename nothing is there to load; after it everything is. A failure anywhere is raised on every rank. The collectives are
all on the main thread; whatever touches the storage is in the writer thread, so that waiting for it has a limit.
"""

import contextlib
import logging
import os
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from bagualu.comm.group import Group
from bagualu.fault_tolerance.checkpoint.commit import commit, manifest_of
from bagualu.fault_tolerance.checkpoint.directory import SAVING, delete, doom, temporary_for
from bagualu.fault_tolerance.checkpoint.exchange import broadcast_json, collect_json
from bagualu.fault_tolerance.checkpoint.fence import Fence
from bagualu.fault_tolerance.checkpoint.format import CheckpointError, step_name
from bagualu.fault_tolerance.checkpoint.retention import prune
from bagualu.fault_tolerance.checkpoint.shard import Piece, write_shard
from bagualu.fault_tolerance.checkpoint.writer import Job, Outcome, Writer

_HOST = torch.device("cpu")
_TIMEOUT_SECONDS = 300.0
_REMEDY = "earlier checkpoints are as they were; repair this and save again"
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class _UnderWay:
    step: int
    metadata: dict[str, Any]
    temporary: Path
    part: Job
    deadline: float
    """Monotonic time by which this rank's part must be durable."""


class Saver:
    """One rank's saves, one at a time. Every rank calls `start` and `conclude` alike, on its main thread.

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

    @property
    def under_way(self) -> bool:
        """Whether a save has been started and not concluded; the same on every rank."""
        return self._under_way is not None

    def status(self) -> tuple[float, float]:
        """(1.0 while this rank's part of the save under way is not finished, 1.0 when it has failed): add them up over the ranks.

        When the first sum is 0 or the second is not, `conclude` does not have to wait.
        """
        if self._under_way is None:
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
        part = self._writer.submit(self._write_part, temporary, root / step_name(step), pieces)
        self._under_way = _UnderWay(step, metadata, temporary, part, time.monotonic() + self.timeout_seconds)

    def conclude(self, wait: bool = True) -> Path:
        """Commit the save under way, or give it up; its path. Collective.

        wait=False, after `status` has said that some rank failed, does not wait for parts that are still being written.
        Raises CheckpointError on every rank when any rank failed; then nothing new is there and the earlier checkpoints are as
        they were.
        """
        save = self._under_way
        assert save is not None
        self._under_way = None
        self.group.monitor.at("durable")
        own = save.part.wait(save.deadline - time.monotonic()) if wait else self._outcome(save)
        self.group.monitor.at("commit")
        outcomes = collect_json(own, self.group, self.device)
        verdict = self._decide(save, outcomes) if outcomes is not None else None
        verdict = broadcast_json(verdict, self.group, self.device)
        if "error" in verdict:
            raise CheckpointError(f"step {save.step} was not saved: {verdict['error']}; {_REMEDY}")
        final = self.fence.root / step_name(save.step)
        self.group.monitor.at("prune")
        if self.group.rank == 0:
            self._writer.submit(self._prune, final)
        return final

    def close(self, wait: bool = True) -> None:
        """Nothing is saved after it. `wait`: for the writer to finish what it does; old checkpoints are removed after a commit."""
        self._writer.close(self.timeout_seconds if wait else 0)

    def _outcome(self, save: _UnderWay) -> Outcome | None:
        late = time.monotonic() > save.deadline
        return save.part.wait(0) if late else save.part.outcome

    def _decide(self, save: _UnderWay, outcomes: list[Outcome | None]) -> Outcome:
        """Rank 0: commit if every part is durable; what became of it, for all ranks."""
        errors = [(rank, o["error"]) for rank, o in zip(self.group.ranks, outcomes, strict=True) if o and "error" in o]
        if errors:
            self._writer.submit(_remove_quietly, save.temporary)
            more = f" (and {len(errors) - 1} more ranks)" if len(errors) > 1 else ""
            return {"error": f"rank {errors[0][0]}{more}: {errors[0][1]}"}
        reports = [outcome["done"] for outcome in outcomes if outcome]
        verdict = self._writer.submit(self._commit, save, reports).wait(self.timeout_seconds)
        if "error" in verdict:
            self._writer.submit(_remove_quietly, save.temporary)
            return {"error": f"rank {self.group.ranks[0]}: {verdict['error']}"}
        return verdict

    def _write_part(self, temporary: Path, final: Path, pieces: Iterable[Piece]) -> dict[str, Any]:
        """In the writer thread: this rank's shard, durable; its report. The order of the first two lines is the fence."""
        temporary.mkdir(exist_ok=True)
        self.fence.check()
        if self.group.rank == 0:
            _clear_failed(temporary, self.fence)
            if os.path.lexists(final):
                raise CheckpointError(f"{final} is there already and never overwritten; resume from it or remove it first")
        return write_shard(temporary / f"rank-{self.group.ranks[self.group.rank]:05d}.safetensors", pieces)

    def _commit(self, save: _UnderWay, reports: list[dict[str, Any]]) -> None:
        manifest = manifest_of(save.step, save.metadata, self.group.ranks, reports)
        commit(self.fence, save.temporary, self.fence.root / step_name(save.step), manifest)

    def _prune(self, just_saved: Path) -> None:
        """The checkpoint is committed: that an old one cannot be removed is no reason to call the save failed."""
        try:
            self.fence.check()
            prune(self.fence.root, self.keep, just_saved)
        except CheckpointError as error:
            log.warning("checkpoint.keep=%d: %s", self.keep, error)


def take_fence(root: Path, group: Group, device: torch.device = _HOST, timeout_seconds: float = _TIMEOUT_SECONDS) -> Fence:
    """The fence of `root` for all ranks of `group`, taken by position 0. Collective. Raises CheckpointError on every rank."""
    verdict = None
    if group.rank == 0:
        writer = Writer(group.ranks[0])
        taken = writer.submit(Fence.take, root).wait(timeout_seconds)
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

"""Rank 0's part of a save: makes the manifest from the reports of all ranks and commits the checkpoint by a rename."""

import os
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bagualu.fault_tolerance.checkpoint.layout import format
from bagualu.fault_tolerance.checkpoint.layout.directory import delete, doom
from bagualu.fault_tolerance.checkpoint.layout.durable import durable_file, fsync_directory, write_all
from bagualu.fault_tolerance.checkpoint.layout.format import (
    MANIFEST,
    CheckpointError,
    CheckpointStorageError,
    Manifest,
    StoredBox,
    StoredFile,
    StoredTensor,
)
from bagualu.fault_tolerance.checkpoint.layout.manifest import encode
from bagualu.fault_tolerance.checkpoint.saving.fence import Fence

_TOO_LATE = "the storage answered after the save had been given up"


class Claim:
    """Decides whether a save is committed or given up: the writer thread and the main thread each try, and the first wins."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._taken_by: str | None = None

    def commit(self) -> bool:
        """Claims the save for the commit; returns False if the save has been given up before, else True."""
        return self._take("commit")

    def give_up(self) -> bool:
        """Claims the save for giving it up; returns False if the save has been committed before, else True."""
        return self._take("give up")

    @property
    def given_up(self) -> bool:
        return self._taken_by == "give up"

    def _take(self, who: str) -> bool:
        with self._lock:
            self._taken_by = self._taken_by or who
            return self._taken_by == who


def commit(fence: Fence, temporary: Path, final: Path, manifest: Manifest, claim: Claim) -> None:
    """Writes the manifest and renames `temporary` to `final`, which makes it a checkpoint, unless the save has been given up.

    If the save is given up during the rename, or the rename cannot be made durable, it is undone. Raises OSError, ValueError or
    CheckpointError if the save is not committed.
    """
    for name, file in manifest.files.items():
        if not (temporary / name).exists() or (temporary / name).stat().st_size != file.bytes:
            raise CheckpointError(f"rank 0's node does not see {name} as it was written; "
                                  "put run.dir on storage that all nodes share")  # fmt: skip
    with durable_file(temporary / MANIFEST) as descriptor:
        write_all(descriptor, encode(manifest))
    fsync_directory(temporary)
    fence.check()
    if claim.given_up:
        raise CheckpointStorageError(_TOO_LATE)
    os.rename(temporary, final)
    try:
        fsync_directory(final.parent)
    except OSError as error:  # it is visible but may not be durable; undo it, so that "not saved" is true
        _take_back(final, str(error))
        raise
    if not claim.commit():
        _take_back(final, _TOO_LATE)
        raise CheckpointStorageError(_TOO_LATE)


def _take_back(final: Path, why: str) -> None:
    """Renames `final`, so that it is no longer a checkpoint, and deletes it. Raises CheckpointError, with `why`, the reason for
    undoing the commit, if `final` cannot be renamed."""
    try:
        doomed = doom(final)
    except OSError as error:
        raise CheckpointError(f"{why}; {final} exists nevertheless and cannot be renamed ({error}): remove it") from error
    delete(doomed)


def manifest_of(step: int, metadata: dict[str, Any], ranks: Sequence[int], reports: Sequence[dict[str, Any]]) -> Manifest:
    """Returns the manifest that combines the reports of all ranks (see `write_shard`). Raises CheckpointError if their boxes do not
    cover every tensor exactly once, or ranks disagree on a tensor's shape or dtype."""
    manifest = gathered(step, metadata, ranks, reports)
    wrong = manifest.problem()
    if wrong:
        raise CheckpointError(wrong)
    return manifest


def gathered(step: int, metadata: dict[str, Any], ranks: Sequence[int], reports: Sequence[dict[str, Any]]) -> Manifest:
    """Returns the manifest of the shards that `ranks` reported (see `write_shard`), which need not make up whole tensors.

    Raises CheckpointError if ranks disagree on the shape or dtype of a tensor.
    """
    manifest = Manifest(step, metadata, format.BLOCK_BYTES)
    boxes: dict[str, list[StoredBox]] = {}
    kinds: dict[str, tuple[tuple[int, ...], str]] = {}
    for rank, report in zip(ranks, reports, strict=True):
        for entry in report["boxes"]:
            name, kind = entry["name"], (tuple(entry["global_shape"]), entry["dtype"])
            if kinds.setdefault(name, kind) != kind:
                raise CheckpointError(f"tensor {name} is {kinds[name]} on an earlier rank and {kind} on rank {rank}")
            stored = entry["stored"]
            fields = {key: tuple(stored[key]) for key in ("offset", "shape", "hashes")}
            boxes.setdefault(name, []).append(StoredBox(**{**stored, **fields}))
            manifest.files[stored["file"]] = StoredFile(**report["file"])
    for name, (shape, dtype) in kinds.items():
        manifest.tensors[name] = StoredTensor(shape, dtype, tuple(boxes[name]))
    return manifest

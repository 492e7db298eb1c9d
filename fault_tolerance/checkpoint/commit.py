"""Rank 0's part of a save: the manifest from what all ranks report, and the rename that makes it a checkpoint."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bagualu.fault_tolerance.checkpoint import format
from bagualu.fault_tolerance.checkpoint.directory import discard
from bagualu.fault_tolerance.checkpoint.durable import durable_file, fsync_directory, write_all
from bagualu.fault_tolerance.checkpoint.fence import Fence
from bagualu.fault_tolerance.checkpoint.format import MANIFEST, CheckpointError, Manifest, StoredBox, StoredFile, StoredTensor
from bagualu.fault_tolerance.checkpoint.manifest import encode


def commit(fence: Fence, temporary: Path, final: Path, manifest: Manifest) -> None:
    """Write the manifest and rename: from then on it is a checkpoint. Raises OSError, ValueError, CheckpointError."""
    for name, file in manifest.files.items():
        if not (temporary / name).exists() or (temporary / name).stat().st_size != file.bytes:
            raise CheckpointError(f"rank 0's node does not see {name} as it was written; "
                                  "put run.dir on storage that all nodes share")  # fmt: skip
    with durable_file(temporary / MANIFEST) as descriptor:
        write_all(descriptor, encode(manifest))
    fsync_directory(temporary)
    fence.check()
    os.rename(temporary, final)
    try:
        fsync_directory(final.parent)
    except OSError:  # visible but perhaps not durable: take it back, so that "not saved" is true
        discard(final)
        raise


def manifest_of(step: int, metadata: dict[str, Any], ranks: Sequence[int], reports: list[dict[str, Any]]) -> Manifest:
    """All ranks' reports in one. Raises CheckpointError when they do not make up whole tensors."""
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
    wrong = manifest.problem()
    if wrong:
        raise CheckpointError(wrong)
    return manifest

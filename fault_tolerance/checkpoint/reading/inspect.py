"""Describes and verifies a run's checkpoints, for `bagualu checkpoint list|verify`."""

from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

from bagualu.fault_tolerance.checkpoint.layout.blocks import damaged_blocks, open_shard
from bagualu.fault_tolerance.checkpoint.layout.format import MANIFEST, CheckpointError, Manifest, StoredBox, step_of
from bagualu.fault_tolerance.checkpoint.layout.manifest import read_manifest


def describe(path: Path) -> dict[str, Any]:
    """Returns a description of the checkpoint at `path`, as plain JSON, without reading its data.

    Keys: path, step, saved (seconds since the epoch), bytes, tensors (a count), shards (a count), layout (metadata["layout"], if
    any), metadata, problem. `problem` is None, or the problem found by a quick check (manifest, size and header of every shard);
    `verify` reads everything. If the manifest cannot be read, only path, step and problem are not None.
    """
    row: dict[str, Any] = dict.fromkeys(("path", "step", "saved", "bytes", "tensors", "shards", "layout", "metadata", "problem"))
    row.update(path=str(path), step=step_of(path))
    try:
        manifest = read_manifest(path)
        row.update(step=manifest.step, bytes=manifest.bytes, tensors=len(manifest.tensors), shards=len(manifest.files))
        row.update(metadata=manifest.metadata, layout=manifest.metadata.get("layout"))
        row.update(saved=(path / MANIFEST).stat().st_mtime)
        check_files(path, manifest)
    except CheckpointError as error:
        row["problem"] = str(error)
    return row


def verify(path: Path, threads: int = 1) -> list[str]:
    """Reads every byte of the checkpoint at `path`, in `threads` threads, and returns a line per problem; [] if the checkpoint is
    undamaged."""
    try:
        manifest = read_manifest(path)
    except CheckpointError as error:
        return [str(error)]
    stored: dict[str, list[tuple[str, int, StoredBox]]] = {file: [] for file in manifest.files}
    problems = []
    for name, tensor in manifest.tensors.items():
        try:
            for box in tensor.boxes:
                stored[box.file].append((name, tensor.bytes_of(box), box))
        except CheckpointError as error:
            problems.append(str(error))
    with ThreadPoolExecutor(threads) as pool:
        for damages in pool.map(partial(damage, path, manifest), stored, stored.values()):
            problems += damages
    return problems


def is_whole(path: Path) -> bool:
    """Returns whether a quick check of the checkpoint at `path` (manifest, size and header of every shard) finds no problem."""
    try:
        check_files(path, read_manifest(path))
    except CheckpointError:
        return False
    return True


def check_files(path: Path, manifest: Manifest) -> None:
    """Raises CheckpointError for the first shard that cannot be opened or has a wrong size or header."""
    for name in manifest.files:
        open_shard(path, manifest, name).close()


def damage(path: Path, manifest: Manifest, name: str, boxes: list[tuple[str, int, StoredBox]]) -> list[str]:
    """Reads the shard `name` and returns a line per problem: damaged blocks, and bytes that belong to no box or to two. `boxes`:
    (tensor name, bytes, box) of every box in it."""
    problems = list(_gaps(path, manifest, name, boxes))
    try:
        with open_shard(path, manifest, name) as shard:
            buffer = bytearray(min(manifest.block_bytes, max((size for _, size, _ in boxes), default=0)))
            for tensor, size, box in boxes:
                problems += damaged_blocks(shard, f"{path}: tensor {tensor} in {name}", box, size, manifest.block_bytes, buffer)
    except CheckpointError as error:
        problems.append(str(error))
    return problems


def _gaps(path: Path, manifest: Manifest, name: str, boxes: list[tuple[str, int, StoredBox]]) -> Iterable[str]:
    """Yields a line for each range of bytes of the shard `name` that belongs to two boxes, or to no box, so that no hash covers
    it."""
    spans = sorted((box.start, box.start + size) for _, size, box in boxes if size)
    about = manifest.files[name]
    for (_, end), (begin, _) in pairwise([(0, about.header_bytes), *spans, (about.bytes, about.bytes)]):
        if end != begin:
            what = "belong to no tensor" if end < begin else "belong to two tensors"
            yield f"{path}: bytes {min(begin, end)} to {max(begin, end)} of {name} {what}; save it again with this version"

"""What is in a run's checkpoints and whether they are whole, for `bagualu checkpoint list|verify`. Free of torch."""

from io import FileIO
from math import prod
from pathlib import Path
from typing import Any

from bagualu.fault_tolerance.checkpoint.blocks import open_shard, read_blocks
from bagualu.fault_tolerance.checkpoint.directory import list_checkpoints
from bagualu.fault_tolerance.checkpoint.format import CheckpointError, Manifest, StoredBox, read_manifest, step_of


def describe(root: Path) -> list[dict[str, Any]]:
    """One plain dict for each checkpoint under `root`, oldest first.

    Its keys: path, step, bytes, tensors (how many), layout (metadata["layout"], if any), metadata, problem. `problem`
    is None, or what a quick look (manifest, size and header of every shard) finds wrong; `verify` reads everything.
    Where the manifest is damaged, only path, step and problem are not None.
    """
    rows = []
    for path in list_checkpoints(root):
        row: dict[str, Any] = dict.fromkeys(("path", "step", "bytes", "tensors", "layout", "metadata", "problem"))
        row.update(path=str(path), step=step_of(path))
        try:
            manifest = read_manifest(path)
            row.update(bytes=manifest.bytes, tensors=len(manifest.tensors), metadata=manifest.metadata)
            row.update(layout=manifest.metadata.get("layout"))
            check_files(path, manifest)
        except CheckpointError as error:
            row["problem"] = str(error)
        rows.append(row)
    return rows


def verify(path: Path) -> list[str]:
    """Read every byte of the checkpoint at `path`; everything that is wrong, one line each, [] when it is whole."""
    try:
        manifest = read_manifest(path)
    except CheckpointError as error:
        return [str(error)]
    problems = []
    wrong = manifest.problem()
    if wrong:
        problems.append(f"{path}: {wrong}")
    stored: dict[str, list[tuple[str, int, StoredBox]]] = {file: [] for file in manifest.files}
    for name, tensor in manifest.tensors.items():
        for box in tensor.boxes:
            stored[box.file].append((name, prod(box.shape) * tensor.item_bytes, box))
    for file, boxes in stored.items():
        try:
            with open_shard(path, manifest, file) as shard:
                for name, size, box in boxes:
                    problems += _damage(shard, f"{path}: tensor {name} in {file}", size, box, manifest.block_bytes)
        except CheckpointError as error:
            problems.append(str(error))
    return problems


def is_whole(path: Path) -> bool:
    """Whether a quick look finds nothing wrong: manifest, and the size and header of every shard."""
    try:
        check_files(path, read_manifest(path))
    except CheckpointError:
        return False
    return True


def check_files(path: Path, manifest: Manifest) -> None:
    """Raises CheckpointError for the first shard that is missing, has another size or another header."""
    for name in manifest.files:
        open_shard(path, manifest, name).close()


def _damage(shard: FileIO, where: str, size: int, box: StoredBox, block_bytes: int) -> list[str]:
    """The damaged blocks of one box of `size` bytes."""
    problems, buffer = [], bytearray(min(size, block_bytes))
    for block in range(len(box.hashes)):
        into = memoryview(buffer)[: size - block * block_bytes]
        try:
            read_blocks(shard, where, box, block_bytes, block, into)
        except CheckpointError as error:
            problems.append(str(error))
    return problems

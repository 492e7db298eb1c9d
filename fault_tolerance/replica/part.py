"""One rank's part of a replica: its shard, as in a checkpoint, and a table, which is the manifest of that shard alone.

So a part can be verified wherever it lies, and parts of one save make up a checkpoint wherever they meet. Their `Origin` says
which save that is.
"""

from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from math import prod
from pathlib import Path
from typing import Any

from bagualu.fault_tolerance.checkpoint import format
from bagualu.fault_tolerance.checkpoint.blocks import open_shard, read_blocks
from bagualu.fault_tolerance.checkpoint.durable import durable_file, write_all
from bagualu.fault_tolerance.checkpoint.format import CheckpointError, Manifest, StoredBox, StoredFile, StoredTensor
from bagualu.fault_tolerance.checkpoint.shard import Piece, write_shard

_ORIGIN = "replica"


@dataclass(frozen=True, order=True)
class Origin:
    """The save that a part comes from: parts of different ones are never mixed."""

    step: int
    session: str
    """The start of the run during which it was made."""
    run: str
    ranks: int
    """How many parts there are in all."""


def shard_name(rank: int) -> str:
    return f"rank-{rank:05d}.safetensors"


def table_name(rank: int) -> str:
    return f"rank-{rank:05d}.json"


def part_of(name: str) -> int:
    """The rank whose shard or table is called `name`."""
    return int(name.removeprefix("rank-").split(".")[0])


def parts_in(folder: Path) -> list[int]:
    """Ranks whose tables lie in `folder`."""
    return sorted(part_of(path.name) for path in folder.glob("rank-*.json"))


def write_part(folder: Path, rank: int, pieces: Iterable[Piece], metadata: dict[str, Any], origin: Origin) -> None:
    """Write shard and table of `rank`; no shard when it holds nothing. Raises OSError, ValueError."""
    report = write_shard(folder / shard_name(rank), pieces)
    tensors: dict[str, StoredTensor] = {}
    for entry in report["boxes"]:
        box, name = StoredBox(**entry["stored"]), entry["name"]
        before = tensors[name].boxes if name in tensors else ()
        tensors[name] = StoredTensor(tuple(entry["global_shape"]), entry["dtype"], (*before, box))
    files = {shard_name(rank): StoredFile(**report["file"])} if report["file"] else {}
    write_table(folder, rank, Manifest(origin.step, {**metadata, _ORIGIN: asdict(origin)}, format.BLOCK_BYTES, files, tensors))


def write_table(folder: Path, rank: int, table: Manifest) -> None:
    """Raises OSError, ValueError."""
    with durable_file(folder / table_name(rank)) as descriptor:
        write_all(descriptor, format.encode(table))


def read_table(folder: Path, rank: int) -> Manifest:
    """The table of `rank`'s part in `folder`, and a look at the shard's size. Raises CheckpointError."""
    path = folder / table_name(rank)
    try:
        table = format.decode(path.read_bytes())
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read ({error.strerror})") from error
    except ValueError as error:
        raise CheckpointError(f"{path} {error}") from error
    if not set(table.files) <= {shard_name(rank)}:
        raise CheckpointError(f"{path} is the table of another part")
    for name in table.files:
        open_shard(folder, table, name, check_header=False).close()
    return table


def origin_of(table: Manifest) -> Origin:
    """The save that the part of `table` comes from."""
    return Origin(**table.metadata[_ORIGIN])


def verify_part(folder: Path, rank: int, origin: Origin) -> Manifest:
    """The table of `rank`'s part, every byte of whose shard has been read and verified. Raises CheckpointError."""
    table = read_table(folder, rank)
    if origin_of(table) != origin:
        raise CheckpointError(f"{folder / table_name(rank)} is of another save")
    buffer = bytearray(table.block_bytes if table.files else 0)
    for name in table.files:
        with open_shard(folder, table, name) as shard:
            for tensor_name, tensor in table.tensors.items():
                where = f"{folder}: tensor {tensor_name} in {name}"
                for box in tensor.boxes:
                    size = prod(box.shape) * tensor.item_bytes
                    for block in range(len(box.hashes)):
                        into = memoryview(buffer)[: size - block * table.block_bytes]
                        read_blocks(shard, where, box, table.block_bytes, block, into)
    return table


def whole(tables: Iterable[Manifest]) -> Manifest:
    """The manifest of all parts together. Raises CheckpointError when they do not make up whole tensors."""
    merged: Manifest | None = None
    for table in tables:
        if merged is None:
            merged = replace(table, files=dict(table.files), tensors=dict(table.tensors))
            continue
        merged.files.update(table.files)
        for name, tensor in table.tensors.items():
            before = merged.tensors.get(name)
            if before is not None and (before.shape, before.dtype) != (tensor.shape, tensor.dtype):
                raise CheckpointError(f"tensor {name} is {before.shape} {before.dtype} on one rank, "
                                      f"{tensor.shape} {tensor.dtype} on another")  # fmt: skip
            merged.tensors[name] = replace(tensor, boxes=(*(before.boxes if before else ()), *tensor.boxes))
    assert merged is not None
    wrong = merged.problem()
    if wrong:
        raise CheckpointError(wrong)
    return merged

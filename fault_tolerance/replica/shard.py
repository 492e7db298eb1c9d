"""A rank's part of a replica: its shard, as in a checkpoint, and a table of the shard's content, with its own hash.

So each part can be verified on its own, and all parts of a save, once they are in one folder, make up a checkpoint. `Origin`
identifies the save.
"""

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from bagualu.fault_tolerance.checkpoint.layout.blocks import damaged_blocks, open_shard
from bagualu.fault_tolerance.checkpoint.layout.durable import durable_file, write_all
from bagualu.fault_tolerance.checkpoint.layout.format import CheckpointError, Manifest, digest
from bagualu.fault_tolerance.checkpoint.layout.shard import write_shard
from bagualu.fault_tolerance.checkpoint.saving.commit import gathered, manifest_of
from bagualu.parallel.boxes import TensorPiece

_HASH_LENGTH = 32


@dataclass(frozen=True, order=True)
class Origin:
    """Identifies the save that a part belongs to. Parts of different saves are never mixed."""

    step: int
    session: str
    """Identifies the start of the run that made the save; sorts after the sessions of earlier starts."""
    run: str
    ranks: int
    """The number of ranks that made the save, which is the number of its parts."""


@dataclass(frozen=True)
class ShardTable:
    """The description of a part: its origin and its content. Except for the origin, all fields are plain JSON."""

    origin: Origin
    metadata: dict[str, Any]
    report: dict[str, Any]
    """What `write_shard` returned for the shard."""

    def encode(self) -> bytes:
        content = json.dumps(asdict(self), allow_nan=False, separators=(",", ":")).encode()
        return digest(content).encode() + content

    @staticmethod
    def decode(raw: bytes) -> "ShardTable":
        """Returns the table that `encode` made. Raises ValueError if any byte of `raw` has changed."""
        hashed, content = raw[:_HASH_LENGTH], raw[_HASH_LENGTH:]
        if digest(content).encode() != hashed:
            raise ValueError("does not match its own hash")
        fields = json.loads(content)
        return ShardTable(Origin(**fields["origin"]), fields["metadata"], fields["report"])

    def manifest(self, rank: int) -> Manifest:
        """Returns a manifest of this part alone, which is that of `rank`."""
        return gathered(self.origin.step, self.metadata, [rank], [self.report])


def shard_name(rank: int) -> str:
    return f"rank-{rank:05d}.safetensors"


def table_name(rank: int) -> str:
    return f"rank-{rank:05d}.json"


def part_of(name: str) -> int:
    """Returns the rank whose shard or table has this name."""
    return int(name.removeprefix("rank-").split(".")[0])


def parts_in(folder: Path) -> list[int]:
    """Returns the ranks whose tables are in `folder`."""
    return sorted(part_of(path.name) for path in folder.glob("rank-*.json"))


def write_part(folder: Path, rank: int, pieces: Iterable[TensorPiece], metadata: dict[str, Any], origin: Origin) -> None:
    """Writes the table of `rank` and, unless `pieces` have no elements, its shard. Raises OSError if writing fails, ValueError if
    pieces or metadata are invalid."""
    write_table(folder, rank, ShardTable(origin, metadata, write_shard(folder / shard_name(rank), pieces)))


def write_table(folder: Path, rank: int, table: ShardTable) -> None:
    """Writes the table of `rank` durably to a new file. Raises OSError, or ValueError if its content is not plain JSON."""
    with durable_file(folder / table_name(rank)) as descriptor:
        write_all(descriptor, table.encode())


def read_table(folder: Path, rank: int) -> ShardTable:
    """Returns the table of `rank`'s part in `folder` after checking the table's hash and the size of the shard. Raises
    CheckpointError if either is wrong."""
    path = folder / table_name(rank)
    try:
        table = ShardTable.decode(path.read_bytes())
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read ({error.strerror})") from error
    except ValueError as error:
        raise CheckpointError(f"{path} {error}") from error
    manifest = table.manifest(rank)
    for name in manifest.files:
        open_shard(folder, manifest, name, check_header=False).close()
    return table


def verify_part(folder: Path, rank: int, origin: Origin) -> ShardTable:
    """Returns the table of `rank`'s part in `folder` after verifying every byte of its shard. Raises CheckpointError if the part is
    damaged or does not belong to `origin`."""
    table = read_table(folder, rank)
    if table.origin != origin:
        raise CheckpointError(f"{folder / table_name(rank)} belongs to another save")
    manifest = table.manifest(rank)
    buffer = bytearray(manifest.block_bytes if manifest.files else 0)
    for name in manifest.files:
        with open_shard(folder, manifest, name) as shard:
            for tensor_name, tensor in manifest.tensors.items():
                where = f"{folder}: tensor {tensor_name} in {name}"
                for box in tensor.boxes:
                    for problem in damaged_blocks(shard, where, box, tensor.bytes_of(box), manifest.block_bytes, buffer):
                        raise CheckpointError(problem)
    return table


def whole(tables: dict[int, ShardTable]) -> Manifest:
    """Returns the manifest of all parts together; `tables` is by rank. Raises CheckpointError if they do not make up whole
    tensors."""
    ranks = sorted(tables)
    return manifest_of(tables[0].origin.step, tables[0].metadata, ranks, [tables[rank].report for rank in ranks])

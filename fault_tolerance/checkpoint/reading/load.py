"""Loads any boxes of stored tensors, however the tensors were divided into boxes when they were saved.

The requests are turned into jobs, one per block of a stored box that contains requested elements. So every block is read and
verified once and copied to every request that needs a part of it; a block that a single request needs completely is read straight
into its tensor. Several threads do the jobs, each file in the order of its bytes; reading and hashing release the interpreter lock.
"""

from collections import defaultdict
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from difflib import get_close_matches
from io import FileIO
from pathlib import Path
from typing import Any

import torch

from bagualu.fault_tolerance.checkpoint.layout.blocks import open_shard, read_blocks
from bagualu.fault_tolerance.checkpoint.layout.format import REMEDY, CheckpointError, StoredBox, StoredTensor
from bagualu.fault_tolerance.checkpoint.layout.manifest import read_manifest
from bagualu.parallel.boxes import Box, TensorPiece, flat_range_to_boxes

_RUN_BYTES = 2**26
"""Approximate bytes that a thread reads from a file before it takes other jobs."""


@dataclass
class _Wanted:
    """A stored box of which parts are requested, and those parts."""

    name: str
    tensor: StoredTensor
    stored: StoredBox
    parts: list[tuple[Box, torch.Tensor]] = field(default_factory=list)
    """Pairs of a part, with its offset relative to the stored box, and the tensor of the same shape that receives it."""

    @property
    def size(self) -> int:
        return self.tensor.bytes_of(self.stored)


@dataclass(frozen=True)
class _Job:
    """A task for a thread: to read block number `block` of a stored box, verify it and copy it to the tensors that requested it."""

    wanted: _Wanted
    block: int
    parts: Sequence[tuple[Box, torch.Tensor]]
    """Those of `wanted.parts` that may overlap the block."""


class Checkpoint:
    """A committed checkpoint, open for reading. Its manifest is verified when it is opened.

    The constructor and the methods that read raise CheckpointError: one line with path, tensor, problem and fix.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._manifest = read_manifest(path)
        self._seen: set[str] = set()  # shards whose header has been verified

    @property
    def step(self) -> int:
        return self._manifest.step

    @property
    def metadata(self) -> dict[str, Any]:
        return self._manifest.metadata

    @property
    def digest(self) -> str:
        """Hash of the manifest's content. Ranks with equal digests see the same checkpoint."""
        return self._manifest.digest

    @property
    def tensors(self) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """The global shape and the dtype of every tensor, by name."""
        return {name: (t.shape, getattr(torch, t.dtype)) for name, t in self._manifest.tensors.items()}

    def read(self, name: str, offset: tuple[int, ...], out: torch.Tensor) -> None:
        """Fills `out` with the box of tensor `name` that begins at `offset`; see `read_all`."""
        shape = self._manifest.tensors[name].shape if name in self._manifest.tensors else ()
        self.read_all([TensorPiece(name, shape, offset, out)])

    def read_all(self, pieces: Iterable[TensorPiece], threads: int = 1) -> None:
        """Fills the tensor of every piece with stored values, in `threads` threads.

        The tensors must have the stored dtype; their strides and devices do not matter. Only blocks between the first and the last
        requested element of a box are read, and each of them is verified. After an error the tensors may hold anything and must not
        be used.
        """
        runs = _runs(self._jobs(pieces))
        if threads == 1 or len(runs) < 2:
            for run in runs:
                self._read_run(run)
            return
        with ThreadPoolExecutor(threads) as pool:
            for _ in pool.map(self._read_run, runs):
                pass  # raises the first error, in the order of the runs, and abandons the rest

    def _jobs(self, pieces: Iterable[TensorPiece]) -> list[_Job]:
        wanted: dict[tuple[str, int], _Wanted] = {}
        for piece in pieces:
            tensor, box = self._checked(piece), piece.box
            held = 0
            for number, stored in enumerate(tensor.boxes):
                common = stored.box.intersection(box)
                if common:
                    held += common.elements
                    box_parts = wanted.setdefault((piece.name, number), _Wanted(piece.name, tensor, stored))
                    part = common.shift(tuple(-o for o in stored.offset))
                    box_parts.parts.append((part, piece.tensor[common.slices(box.offset)]))
            if held != box.elements:
                raise self._error(piece.name, f"has only {held} of the {box.elements} elements at {box.offset}; {REMEDY}")
        return [job for box_parts in wanted.values() for job in self._blocks(box_parts)]

    def _checked(self, piece: TensorPiece) -> StoredTensor:
        name, box = piece.name, piece.box
        if name not in self._manifest.tensors:
            near = get_close_matches(name, self._manifest.tensors, 1)
            hint = f"the nearest is {near[0]}; " if near else ""
            raise self._error(name, f"is not in it; {hint}load it into the model that wrote it")
        tensor = self._manifest.tensors[name]
        if not box.inside(tensor.shape):
            raise self._error(name, f"has shape {tensor.shape}: no box of shape {box.shape} at {box.offset}; "
                                    "load it into the model that wrote it")  # fmt: skip
        if piece.dtype != tensor.dtype:
            raise self._error(name, f"is stored as {tensor.dtype}, not {piece.tensor.dtype}; read it as that and convert")
        return tensor

    def _blocks(self, wanted: _Wanted) -> Iterable[_Job]:
        """Returns jobs for the blocks of a stored box from the first to the last that contains elements of a requested part."""
        per_block = self._manifest.block_bytes // wanted.tensor.item_bytes
        shape = wanted.stored.shape
        parts: defaultdict[int, list[tuple[Box, torch.Tensor]]] = defaultdict(list)
        for part, out in wanted.parts:
            last = tuple(stop - 1 for stop in part.stop)
            for block in range(_flat(shape, part.offset) // per_block, _flat(shape, last) // per_block + 1):
                parts[block].append((part, out))
        return [_Job(wanted, block, members) for block, members in parts.items()]

    def _read_run(self, run: Sequence[_Job]) -> None:
        name = run[0].wanted.stored.file
        with open_shard(self.path, self._manifest, name, check_header=name not in self._seen) as file:
            self._seen.add(name)
            for job in run:
                self._read_job(file, job)

    def _read_job(self, file: FileIO, job: _Job) -> None:
        """Reads and verifies a block and copies its elements to the tensors that requested them."""
        wanted, block_bytes = job.wanted, self._manifest.block_bytes
        item, shape = wanted.tensor.item_bytes, wanted.stored.shape
        begin, end = job.block * block_bytes, min((job.block + 1) * block_bytes, wanted.size)
        where = f"{self.path}: tensor {wanted.name} in {wanted.stored.file}"
        into = _straight(job, begin // item, end // item)
        if into is not None:
            return read_blocks(file, where, wanted.stored, block_bytes, job.block, _bytes(into))
        buffer = torch.empty((end - begin) // item, dtype=getattr(torch, wanted.tensor.dtype))
        read_blocks(file, where, wanted.stored, block_bytes, job.block, _bytes(buffer))
        for flat, box in flat_range_to_boxes(shape, begin // item, end // item):
            values = buffer[flat - begin // item :][: box.elements].view(box.shape)
            for part, out in job.parts:
                common = box.intersection(part)
                if common:
                    out[common.slices(part.offset)].copy_(values[common.slices(box.offset)])
        return None

    def _error(self, name: str, what: str) -> CheckpointError:
        return CheckpointError(f"{self.path}: tensor {name} {what}")


def _runs(jobs: list[_Job]) -> list[list[_Job]]:
    """Returns the jobs in the order of their bytes on disk, grouped into runs: jobs in the same file with about _RUN_BYTES
    together."""
    jobs.sort(key=lambda job: (job.wanted.stored.file, job.wanted.stored.start, job.block))
    runs: list[list[_Job]] = []
    taken = 0
    for job in jobs:
        if not runs or taken >= _RUN_BYTES or runs[-1][0].wanted.stored.file != job.wanted.stored.file:
            runs.append([])
            taken = 0
        runs[-1].append(job)
        taken += job.wanted.size // len(job.wanted.stored.hashes)
    return runs


def _straight(job: _Job, begin: int, end: int) -> torch.Tensor | None:
    """Returns a flat view of the part of the requesting tensor into which elements `begin` to `end` - 1 of the stored box, the
    job's block, can be read straight; None if they must be copied from a buffer."""
    if len(job.parts) > 1:
        return None
    (part, out), shape = job.parts[0], job.wanted.stored.shape
    first = _flat(shape, part.offset)
    last = _flat(shape, tuple(stop - 1 for stop in part.stop))
    consecutive = last - first + 1 == part.elements  # its elements are consecutive in the stored box
    if not (consecutive and out.is_contiguous() and out.device.type == "cpu" and first <= begin and end <= last + 1):
        return None
    return out.view(-1)[begin - first : end - first]


def _flat(shape: tuple[int, ...], index: tuple[int, ...]) -> int:
    """Returns the index of an element in the row-major order of a box of `shape`."""
    flat = 0
    for size, at in zip(shape, index, strict=True):
        flat = flat * size + at
    return flat


def _bytes(tensor: torch.Tensor) -> memoryview:
    """Returns the memory of a flat, contiguous CPU tensor as bytes."""
    flat = tensor.as_strided((tensor.numel(),), (1,))  # because a tensor of one element may have any stride
    return flat.view(torch.uint8).numpy().data

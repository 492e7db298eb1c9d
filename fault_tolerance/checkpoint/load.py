"""Loading: any boxes of any stored tensors, whatever boxes they were saved in.

What is wanted is turned into jobs, one for each block of each stored box that holds any of it. So every block is read once,
verified, and given to whoever wants a part of it; a block that one destination takes whole goes straight there. Jobs are
done file by file from the front, by several threads: reading and hashing let go of the interpreter.
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

from bagualu.fault_tolerance.checkpoint.blocks import open_shard, read_blocks
from bagualu.fault_tolerance.checkpoint.format import REMEDY, CheckpointError, StoredBox, StoredTensor
from bagualu.fault_tolerance.checkpoint.manifest import read_manifest
from bagualu.parallel.boxes import Box, flat_range_to_boxes

_RUN_BYTES = 2**26
"""About what a thread reads of one file before it takes the next piece of work."""


@dataclass(frozen=True)
class Request:
    """Wanted: the box of the global tensor `name` that begins at `offset` and has the shape of `out`, in `out`."""

    name: str
    offset: tuple[int, ...]
    out: torch.Tensor


@dataclass
class _Wanted:
    """A stored box, and the parts of it that are wanted."""

    name: str
    tensor: StoredTensor
    stored: StoredBox
    parts: list[tuple[Box, torch.Tensor]] = field(default_factory=list)
    """(part, seen from the stored box; where it goes, in the part's shape)."""

    @property
    def size(self) -> int:
        return self.tensor.bytes_of(self.stored)


@dataclass(frozen=True)
class _Job:
    """One block of a stored box."""

    wanted: _Wanted
    block: int
    parts: Sequence[tuple[Box, torch.Tensor]]
    """What of it is wanted: (part seen from the stored box, where it goes)."""


class Checkpoint:
    """A committed checkpoint, open for reading; its manifest is verified on opening.

    Raises CheckpointError, here and from every method: one line with path, tensor, what is wrong and what to do.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._manifest = read_manifest(path)
        self._seen: set[str] = set()  # shards whose header is verified

    @property
    def step(self) -> int:
        return self._manifest.step

    @property
    def metadata(self) -> dict[str, Any]:
        return self._manifest.metadata

    @property
    def digest(self) -> str:
        """Hash of the manifest: two ranks that have the same one see the same checkpoint."""
        return self._manifest.digest

    @property
    def tensors(self) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """Global shape and dtype of every tensor, by name."""
        return {name: (t.shape, getattr(torch, t.dtype)) for name, t in self._manifest.tensors.items()}

    def read(self, name: str, offset: tuple[int, ...], out: torch.Tensor) -> None:
        """Fill `out` with one box; see `read_all`."""
        self.read_all([Request(name, offset, out)])

    def read_all(self, requests: Iterable[Request], threads: int = 1) -> None:
        """Fill the `out` of every request.

        Each has the stored dtype, any strides, any device. Only the blocks that hold wanted elements are read, and every one
        of them is verified. On an error the `out`s may hold anything: give fresh ones and use them when all are filled.
        """
        runs = _runs(self._jobs(requests))
        if threads == 1 or len(runs) < 2:
            for run in runs:
                self._read_run(run)
            return
        with ThreadPoolExecutor(threads) as pool:
            for _ in pool.map(self._read_run, runs):
                pass  # the first error, in the order of the runs, is raised here and the rest is given up

    def _jobs(self, requests: Iterable[Request]) -> list[_Job]:
        wanted: dict[tuple[str, int], _Wanted] = {}
        for request in requests:
            tensor, box = self._checked(request)
            held = 0
            for number, stored in enumerate(tensor.boxes):
                common = stored.box.intersection(box)
                if common:
                    held += common.elements
                    place = wanted.setdefault((request.name, number), _Wanted(request.name, tensor, stored))
                    part = common.shift(tuple(-o for o in stored.offset))
                    place.parts.append((part, request.out[common.slices(box.offset)]))
            if held != box.elements:
                raise self._error(request.name, f"has only {held} of the {box.elements} elements at {box.offset}; {REMEDY}")
        return [job for place in wanted.values() for job in self._blocks(place)]

    def _checked(self, request: Request) -> tuple[StoredTensor, Box]:
        name, box = request.name, Box(tuple(request.offset), tuple(request.out.shape))
        if name not in self._manifest.tensors:
            near = get_close_matches(name, self._manifest.tensors, 1)
            hint = f"the nearest is {near[0]}; " if near else ""
            raise self._error(name, f"is not in it; {hint}load it into the model that wrote it")
        tensor = self._manifest.tensors[name]
        if not box.inside(tensor.shape):
            raise self._error(name, f"has shape {tensor.shape}: no box of shape {box.shape} at {box.offset}; "
                                    "load it into the model that wrote it")  # fmt: skip
        if str(request.out.dtype) != f"torch.{tensor.dtype}":
            raise self._error(name, f"is stored as {tensor.dtype}, not {request.out.dtype}; read it as that and convert")
        return tensor, box

    def _blocks(self, wanted: _Wanted) -> Iterable[_Job]:
        """The blocks of a stored box that hold any of its wanted parts."""
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
        """Read one block, verify it, and hand it out."""
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
    """The jobs in the order in which they lie on disk, cut into pieces of work within one file."""
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
    """Where elements begin .. end of the stored box go as they lie, as a flat view of it; None when they must be handed out."""
    if len(job.parts) > 1:
        return None
    (part, out), shape = job.parts[0], job.wanted.stored.shape
    first = _flat(shape, part.offset)
    last = _flat(shape, tuple(stop - 1 for stop in part.stop))
    runs_through = last - first + 1 == part.elements  # its elements lie one after the other in the stored box
    if not (runs_through and out.is_contiguous() and out.device.type == "cpu" and first <= begin and end <= last + 1):
        return None
    return out.view(-1)[begin - first : end - first]


def _flat(shape: tuple[int, ...], index: tuple[int, ...]) -> int:
    """Place of an element in the row-major order of a box of `shape`."""
    flat = 0
    for size, at in zip(shape, index, strict=True):
        flat = flat * size + at
    return flat


def _bytes(tensor: torch.Tensor) -> memoryview:
    """The memory of a flat, contiguous tensor on the host."""
    flat = tensor.as_strided((tensor.numel(),), (1,))  # one element may have any stride
    return flat.view(torch.uint8).numpy().data

"""Loading: any box of any stored tensor, whatever boxes it was saved in."""

from dataclasses import dataclass
from difflib import get_close_matches
from math import prod
from pathlib import Path
from typing import Any

import torch

from bagualu.fault_tolerance.checkpoint.blocks import open_shard, read_blocks
from bagualu.fault_tolerance.checkpoint.format import REMEDY, CheckpointError, StoredBox, StoredTensor, read_manifest
from bagualu.parallel.boxes import Box


@dataclass
class _Held:
    """The blocks read last: reading a tensor in several boxes reads and verifies each block once."""

    buffer: torch.Tensor
    stored: StoredBox | None = None
    first: int = 0
    stop: int = 0


class Checkpoint:
    """A committed checkpoint, open for reading; its manifest is verified on opening. For one thread at a time.

    Raises CheckpointError, here and from every method: one line with path, tensor, what is wrong and what to do.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._manifest = read_manifest(path)
        self._held = _Held(torch.empty(0, dtype=torch.uint8))
        self._seen: set[str] = set()  # shards whose header is verified

    @property
    def step(self) -> int:
        return self._manifest.step

    @property
    def metadata(self) -> dict[str, Any]:
        return self._manifest.metadata

    @property
    def tensors(self) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """Global shape and dtype of every tensor, by name."""
        return {name: (t.shape, getattr(torch, t.dtype)) for name, t in self._manifest.tensors.items()}

    def read(self, name: str, offset: tuple[int, ...], out: torch.Tensor) -> None:
        """Fill `out` with the box of the global tensor `name` that begins at `offset` and has the shape of `out`.

        `out` has the stored dtype, any strides, any device. Only the blocks that hold elements of the box are read, and
        every one of them is verified before anything of it comes into `out`; on an error `out` may hold a part of the
        box, never damaged values.
        """
        tensor, wanted = self._tensor(name), Box(tuple(offset), tuple(out.shape))
        if not wanted.inside(tensor.shape):
            raise self._error(name, f"has shape {tensor.shape}: no box of shape {wanted.shape} at {wanted.offset}; "
                                    "load it into the model that wrote it")  # fmt: skip
        if str(out.dtype) != f"torch.{tensor.dtype}":
            raise self._error(name, f"is stored as {tensor.dtype}, not {out.dtype}; read it as that and convert")
        if not wanted.elements:
            return
        parts = [(stored, common) for stored in tensor.boxes if (common := stored.box.intersection(wanted))]
        held = sum(common.elements for _, common in parts)
        if held != wanted.elements:
            raise self._error(name, f"has only {held} of the {wanted.elements} elements at {wanted.offset}; {REMEDY}")
        for stored, common in parts:
            source = self._elements(name, tensor, stored, common)
            out[common.slices(wanted.offset)].copy_(source)

    def _elements(self, name: str, tensor: StoredTensor, stored: StoredBox, common: Box) -> torch.Tensor:
        """The part `common` of a stored box, read and verified, as a view of the buffer."""
        strides = [prod(stored.shape[dim + 1 :]) for dim in range(len(stored.shape))]
        relative = common.shift(tuple(-o for o in stored.offset))
        begin = sum(o * s for o, s in zip(relative.offset, strides, strict=True))
        last = begin + sum((n - 1) * s for n, s in zip(relative.shape, strides, strict=True))
        per_block = self._manifest.block_bytes // tensor.item_bytes
        first_block, stop_block = begin // per_block, last // per_block + 1
        data = self._blocks(name, tensor, stored, first_block, stop_block).view(getattr(torch, tensor.dtype))
        return data.as_strided(relative.shape, strides, data.storage_offset() + begin - first_block * per_block)

    def _blocks(self, name: str, tensor: StoredTensor, stored: StoredBox, first: int, stop: int) -> torch.Tensor:
        """Blocks first .. stop of a stored box, as bytes in the buffer that are valid until the next call."""
        manifest, held = self._manifest, self._held
        size = min(stop * manifest.block_bytes, prod(stored.shape) * tensor.item_bytes) - first * manifest.block_bytes
        if held.stored is not stored or not held.first <= first < stop <= held.stop:
            held.stored = None
            if held.buffer.numel() < size:
                held.buffer = torch.empty(size, dtype=torch.uint8)
            with open_shard(self.path, manifest, stored.file, stored.file not in self._seen) as file:
                self._seen.add(stored.file)
                where = f"{self.path}: tensor {name} in {stored.file}"
                read_blocks(file, where, stored, manifest.block_bytes, first, held.buffer.numpy().data[:size])
            held.stored, held.first, held.stop = stored, first, stop
        skip = (first - held.first) * manifest.block_bytes
        return held.buffer[skip : skip + size]

    def _tensor(self, name: str) -> StoredTensor:
        if name not in self._manifest.tensors:
            near = get_close_matches(name, self._manifest.tensors, 1)
            hint = f"the nearest is {near[0]}; " if near else ""
            raise self._error(name, f"is not in it; {hint}load it into the model that wrote it")
        return self._manifest.tensors[name]

    def _error(self, name: str, what: str) -> CheckpointError:
        return CheckpointError(f"{self.path}: tensor {name} {what}")

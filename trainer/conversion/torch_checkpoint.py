"""Writes tensors as a checkpoint that torch.distributed.checkpoint loads, a box of a tensor at a time. torch's own writer keeps the
tensors of a file in memory until the file is complete."""

import io
import pickle
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import torch
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

from bagualu.fault_tolerance.checkpoint.layout.durable import durable_file, write_all
from bagualu.parallel.boxes import Box
from bagualu.trainer.models.hugging_face.names import FilePart, Shape

Values = Callable[[FilePart], Iterator[tuple[Box, torch.Tensor]]]
"""Yields the boxes of a tensor that make up a part of it, with their values."""


class TorchCheckpoint:
    """Writes the files of a checkpoint into the directory `folder`: `write` for each, then `finish`. Raises OSError."""

    def __init__(self, folder: Path, shapes: dict[str, Shape], dtype: torch.dtype) -> None:
        """`shapes`: those of all tensors, by name; all have the dtype `dtype`."""
        self._folder, self._dtype, self._files = folder, dtype, 0
        properties = TensorProperties(dtype=dtype)
        self._tensors = {name: TensorStorageMetadata(properties, torch.Size(shape), []) for name, shape in shapes.items()}
        self._places: dict[MetadataIndex, _StorageInfo] = {}

    def write(self, parts: Iterable[FilePart], values: Values) -> None:
        """Writes a file with `parts`, of which `values` yields the values."""
        name, at = f"__0_{self._files}.distcp", 0
        self._files += 1
        with durable_file(self._folder / name) as file:
            for part in parts:
                for box, chunk in values(part):
                    data = _saved(chunk.to(self._dtype))
                    write_all(file, data)
                    self._tensors[part.tensor].chunks.append(ChunkStorageMetadata(torch.Size(box.offset), torch.Size(box.shape)))
                    self._places[MetadataIndex(part.tensor, box.offset)] = _StorageInfo(name, at, len(data))
                    at += len(data)

    def add_name(self, name: str, other: str) -> None:
        """Gives the tensor `other`, which has been written, the name `name` too."""
        self._tensors[name] = self._tensors[other]
        own = {index: place for index, place in self._places.items() if index.fqn == other}
        self._places |= {MetadataIndex(name, index.offset): place for index, place in own.items()}

    def finish(self) -> None:
        """Writes the file that says where the boxes of all tensors are."""
        names = {name: (name,) for name in self._tensors}
        with durable_file(self._folder / ".metadata") as file:
            write_all(file, pickle.dumps(Metadata(dict(self._tensors), names, self._places)))


def _saved(tensor: torch.Tensor) -> memoryview:
    buffer = io.BytesIO()
    torch.save(tensor, buffer)
    return buffer.getbuffer()

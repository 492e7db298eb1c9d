"""Reads boxes of the decoder's parameters from the files of Hugging Face, with little memory besides the result."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from math import prod

import torch

from bagualu.comm.errors import RecipeError
from bagualu.parallel.boxes import Box
from bagualu.trainer.models.hugging_face.directory import HuggingFaceModel
from bagualu.trainer.models.hugging_face.names import FilePart
from bagualu.trainer.models.hugging_face.safetensors_file import FileTensor, read_bytes

_PORTION_BYTES = 2**24
"""About how many bytes are read at a time where the dtype is converted, or the result does not lie in one piece."""


class Reader:
    """Reads parameters of a model. Each rank reads only the bytes of the boxes that it holds."""

    def __init__(self, model: HuggingFaceModel) -> None:
        self._model = model
        self._parts: dict[str, list[FilePart]] = {}
        for part in model.parts:
            self._parts.setdefault(part.parameter, []).append(part)

    def fill(self, name: str, shape: tuple[int, ...], box: Box) -> torch.Tensor:
        """Returns the elements `box` of the parameter `name` of `shape`, in the dtype of the files. Raises RecipeError for a name
        that the model does not have (no family has buffers), and if the files cannot be read."""
        parts = self._parts.get(name)
        if parts is None:
            raise RecipeError(f"{self._model.path} holds nothing for {name}; give a model that has it")
        result = torch.empty(box.shape, dtype=getattr(torch, self._model.tensors[parts[0].tensor].dtype))
        self.read(name, box, result)
        return result

    def read(self, name: str, box: Box, into: torch.Tensor) -> None:
        """Fills `into`, of the shape of `box` and any dtype, with those elements of the parameter `name`. Raises RecipeError."""
        for part in self._parts[name]:
            if both := part.within(box):
                common, there = both
                target = into[common.slices(box.offset)]
                tensor = self._model.tensors[part.tensor]
                with _opened(tensor) as descriptor:
                    _read(descriptor, tensor, there, target.view(there.shape))


@contextmanager
def _opened(tensor: FileTensor) -> Iterator[int]:
    """Yields a file descriptor of the tensor's file."""
    try:
        descriptor = os.open(tensor.path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        raise RecipeError(f"{tensor.path} cannot be read ({error.strerror}); see whether its storage is mounted") from error
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def _read(descriptor: int, tensor: FileTensor, box: Box, into: torch.Tensor) -> None:
    """Fills `into`, of the shape of `box`, with these elements of the tensor."""
    if len(box.shape) == 3:  # expert by expert, each a matrix of the file
        matrix = prod(tensor.shape[1:]) * tensor.item_bytes
        for index in range(box.shape[0]):
            inner = FileTensor(tensor.path, tensor.kind, tensor.shape[1:], tensor.start + (box.offset[0] + index) * matrix)
            _read(descriptor, inner, Box(box.offset[1:], box.shape[1:]), into[index])
        return
    dtype = getattr(torch, tensor.dtype)
    if into.dtype == dtype and into.is_contiguous():
        _read_rows(descriptor, tensor, box, _bytes(into))
        return
    rows = max(1, _PORTION_BYTES // (prod(box.shape[1:]) * tensor.item_bytes))
    for begin in range(0, box.shape[0], rows):
        part = Box((box.offset[0] + begin, *box.offset[1:]), (min(rows, box.shape[0] - begin), *box.shape[1:]))
        buffer = torch.empty(part.shape, dtype=dtype)
        _read_rows(descriptor, tensor, part, _bytes(buffer))
        into[begin : begin + part.shape[0]].copy_(buffer)


def _read_rows(descriptor: int, tensor: FileTensor, box: Box, into: memoryview) -> None:
    """Fills `into` with the bytes of `box`, a box of a vector or matrix: in one piece if its rows are whole, else row by row."""
    item, columns = tensor.item_bytes, prod(tensor.shape[1:])
    first = tensor.start + (box.offset[0] * columns + sum(box.offset[1:])) * item
    if box.shape[1:] == tensor.shape[1:]:
        read_bytes(descriptor, tensor.path, first, into)
        return
    width = box.shape[1] * item
    for row in range(box.shape[0]):
        read_bytes(descriptor, tensor.path, first + row * columns * item, into[row * width : (row + 1) * width])


def _bytes(tensor: torch.Tensor) -> memoryview:
    return tensor.view(-1).view(torch.uint8).numpy().data

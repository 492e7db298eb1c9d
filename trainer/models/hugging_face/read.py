"""Reads boxes of the decoder's parameters from the files of Hugging Face, with little memory besides the result."""

import os
from math import prod

import torch

from bagualu.comm.errors import RecipeError
from bagualu.parallel.boxes import Box
from bagualu.trainer.models.hugging_face.directory import HuggingFaceModel
from bagualu.trainer.models.hugging_face.names import FilePart
from bagualu.trainer.models.hugging_face.safetensors_file import FileTensor, read_rows

_PORTION_BYTES = 2**24
"""About how many bytes are read at a time where a box does not consist of whole rows, or its dtype is converted."""


class Reader:
    """Reads parameters of a model. Each rank reads only the boxes that it holds."""

    def __init__(self, model: HuggingFaceModel) -> None:
        self._model = model
        self._parts: dict[str, list[FilePart]] = {}
        for part in model.parts:
            self._parts.setdefault(part.parameter, []).append(part)

    def fill(self, name: str, shape: tuple[int, ...], box: Box) -> torch.Tensor:
        """Returns the elements `box` of the parameter `name` of `shape`, in the dtype of the files; zeros for a buffer, which no
        family has. Raises RecipeError if the files cannot be read."""
        parts = self._parts.get(name)
        if parts is None:
            return torch.zeros(box.shape)
        result = torch.empty(box.shape, dtype=getattr(torch, self._model.tensors[parts[0].tensor].dtype))
        self.read(name, box, result)
        return result

    def read(self, name: str, box: Box, into: torch.Tensor) -> None:
        """Fills `into`, of the shape of `box` and any dtype, with those elements of the parameter `name`. Raises RecipeError."""
        for part in self._parts[name]:
            if both := part.within(box):
                common, there = both
                target = into[common.slices(box.offset)]
                _read_box(self._model.tensors[part.tensor], there, target.view(there.shape))


def _read_box(tensor: FileTensor, box: Box, into: torch.Tensor) -> None:
    try:
        descriptor = os.open(tensor.path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        raise RecipeError(f"{tensor.path} cannot be read ({error.strerror}); see whether its storage is mounted") from error
    try:
        _read(descriptor, tensor, box, into)
    finally:
        os.close(descriptor)


def _read(descriptor: int, tensor: FileTensor, box: Box, into: torch.Tensor) -> None:
    dtype = getattr(torch, tensor.dtype)
    whole_rows = box.shape[1:] == tensor.shape[1:]
    if whole_rows and into.dtype == dtype and into.is_contiguous():
        read_rows(descriptor, tensor, box, _bytes(into))
        return
    if len(box.shape) == 3:  # expert by expert, each a matrix of the file
        matrix = prod(tensor.shape[1:]) * tensor.item_bytes
        for index in range(box.shape[0]):
            inner = FileTensor(tensor.path, tensor.kind, tensor.shape[1:], tensor.start + (box.offset[0] + index) * matrix)
            _read(descriptor, inner, Box(box.offset[1:], box.shape[1:]), into[index])
        return
    columns = tensor.shape[1:]
    rows = max(1, _PORTION_BYTES // (prod(columns) * tensor.item_bytes))
    for begin in range(0, box.shape[0], rows):
        count = min(rows, box.shape[0] - begin)
        buffer = torch.empty((count, *columns), dtype=dtype)
        read_rows(descriptor, tensor, Box((box.offset[0] + begin, *(0 for _ in columns)), (count, *columns)), _bytes(buffer))
        wanted = tuple(slice(o, o + s) for o, s in zip(box.offset[1:], box.shape[1:], strict=True))
        into[begin : begin + count].copy_(buffer[(slice(None), *wanted)])


def _bytes(tensor: torch.Tensor) -> memoryview:
    return tensor.view(-1).view(torch.uint8).numpy().data

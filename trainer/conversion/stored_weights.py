"""Reads the weights of the model in a checkpoint. Low-rank factors are not part of that model: their products are added to the
weights beside which they lie.

Shapes: O outputs, I inputs, R rank.
"""

import torch

from bagualu.comm.errors import RecipeError
from bagualu.fault_tolerance.checkpoint.reading.load import Checkpoint
from bagualu.parallel.boxes import Box
from bagualu.trainer.models.decoder.identity import lora_of
from bagualu.trainer.models.decoder.lora import FIRST, SECOND

_ROWS, _COLUMNS = 128, 1024
"""The size of a block of a product. Blocks lie on a grid, and each is computed as a whole, so that an element has the same bits
whatever box it is read with."""


class StoredWeights:
    """The weights and buffers in a checkpoint, without factors."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self._checkpoint, self._tensors = checkpoint, checkpoint.tensors
        self._scale = lora_of(checkpoint.metadata.get("identity")).scale

    def fill(self, name: str, shape: tuple[int, ...], box: Box) -> torch.Tensor:
        """Returns the elements `box` of the parameter or buffer `name` of `shape`, in the dtype in which they are stored. Raises
        RecipeError if the checkpoint lacks it, CheckpointError if it cannot be read."""
        for stored in (f"weight/{name}", f"buffer/{name}"):
            if stored in self._tensors:
                values = self._read(stored, box)
                if stored + FIRST in self._tensors:
                    self._add_product(stored, box, values)
                return values
        raise RecipeError(f"{self._checkpoint.path} has no tensor {name}, which its model needs; give a checkpoint that is whole")

    def _add_product(self, stored: str, box: Box, values: torch.Tensor) -> None:
        """Adds the elements `box` of the product of the factors of `stored` to `values`: rows of B [O, R] times columns of A [R,
        I], for each expert if they are stacked."""
        shape, rank = self._tensors[stored][0], self._tensors[stored + FIRST][0][-2]
        whole = _on_grid(shape, box)
        (*experts, row, column), (*count, rows, columns) = whole.offset, whole.shape
        first = self._read(stored + FIRST, Box((*experts, 0, column), (*count, rank, columns))).view(-1, rank, columns)
        second = self._read(stored + SECOND, Box((*experts, row, 0), (*count, rows, rank))).view(-1, rows, rank)
        wanted = Box(box.offset[-2:], box.shape[-2:])
        for target, left, right in zip(values.view(-1, *wanted.shape), second, first, strict=True):
            for begin in range(0, rows, _ROWS):
                product = _product_of_rows(left[begin : begin + _ROWS], right)
                part = Box((row + begin, column), tuple(product.shape))
                common = part.intersection(wanted)
                assert common is not None
                target[common.slices(wanted.offset)].add_(product[common.slices(part.offset)], alpha=self._scale)

    def _read(self, stored: str, box: Box) -> torch.Tensor:
        values = torch.empty(box.shape, dtype=self._tensors[stored][1])
        self._checkpoint.read(stored, box.offset, values)
        return values


def _on_grid(shape: tuple[int, ...], box: Box) -> Box:
    """Returns the smallest box of whole blocks of a tensor of `shape` that contains `box`."""
    extents = (*(1 for _ in shape[:-2]), _ROWS, _COLUMNS)
    offset = tuple(o - o % e for o, e in zip(box.offset, extents, strict=True))
    stops = (min(-(-stop // e) * e, n) for stop, e, n in zip(box.stop, extents, shape, strict=True))
    return Box(offset, tuple(stop - o for stop, o in zip(stops, offset, strict=True)))


def _product_of_rows(second: torch.Tensor, first: torch.Tensor) -> torch.Tensor:
    """Returns the product of rows of B with A, block by block."""
    return torch.cat([second @ columns.contiguous() for columns in first.split(_COLUMNS, 1)], 1)

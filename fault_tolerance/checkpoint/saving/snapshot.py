"""Copies pieces of tensors to host memory, so that training can change the originals while the copies are written."""

from collections.abc import Iterable
from dataclasses import replace

import torch

from bagualu.parallel.boxes import TensorPiece

_ALIGNMENT = 64


class Snapshot:
    """A buffer in host memory for copies of the pieces, reused by every save. It is pinned memory if the pieces are on a GPU."""

    def __init__(self) -> None:
        self._buffer = torch.empty(0, dtype=torch.uint8)

    def take(self, pieces: Iterable[TensorPiece]) -> list[TensorPiece]:
        """Returns copies of `pieces` in the buffer. They overwrite the copies that the previous call returned."""
        originals = list(pieces)
        sizes = [piece.tensor.numel() * piece.tensor.element_size() for piece in originals]
        starts = [0]
        for size in sizes:
            starts.append(-(-(starts[-1] + size) // _ALIGNMENT) * _ALIGNMENT)
        on_gpu = any(piece.tensor.is_cuda for piece in originals)
        if self._buffer.numel() < starts[-1]:
            self._buffer = torch.empty(starts[-1], dtype=torch.uint8, pin_memory=on_gpu)
        copies = []
        for piece, start, size in zip(originals, starts, sizes, strict=False):
            host = self._buffer[start : start + size].view(piece.tensor.dtype).view(piece.tensor.shape)
            host.copy_(piece.tensor.detach(), non_blocking=True)
            copies.append(replace(piece, tensor=host))
        if on_gpu:
            torch.cuda.synchronize()
        return copies

"""Pieces copied to host memory, so that training may go on changing the originals while they are written."""

from collections.abc import Iterable
from dataclasses import replace

import torch

from bagualu.fault_tolerance.checkpoint.shard import Piece

_ALIGNMENT = 64


class Snapshot:
    """One buffer, kept from save to save: as large as the pieces, pinned where they lie on a GPU."""

    def __init__(self) -> None:
        self._buffer = torch.empty(0, dtype=torch.uint8)

    def take(self, pieces: Iterable[Piece]) -> list[Piece]:
        """The same pieces, as they are now, in the buffer. Whatever was taken before is overwritten."""
        given = list(pieces)
        sizes = [piece.tensor.numel() * piece.tensor.element_size() for piece in given]
        starts = [0]
        for size in sizes:
            starts.append(-(-(starts[-1] + size) // _ALIGNMENT) * _ALIGNMENT)
        on_gpu = any(piece.tensor.is_cuda for piece in given)
        if self._buffer.numel() < starts[-1]:
            self._buffer = torch.empty(starts[-1], dtype=torch.uint8, pin_memory=on_gpu)
        copies = []
        for piece, start, size in zip(given, starts, sizes, strict=False):
            host = self._buffer[start : start + size].view(piece.tensor.dtype).view(piece.tensor.shape)
            host.copy_(piece.tensor.detach(), non_blocking=True)
            copies.append(replace(piece, tensor=host))
        if on_gpu:
            torch.cuda.synchronize()
        return copies

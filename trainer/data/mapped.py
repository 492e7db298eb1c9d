"""Token files as one flat array of ids that stays on storage: memory maps, none copied.

Shapes: R windows.
"""

import mmap
import os
from collections.abc import Sequence
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from bagualu.trainer.data.prepared import DataError, Tokens
from bagualu.trainer.data.token_files import TokenFile


class MappedFile:
    """The ids of a token file, mapped into memory. If another file is renamed to its path, reads continue on the original file."""

    def __init__(self, file: TokenFile) -> None:
        """Raises OSError."""
        self.file = file
        with open(file.path, "rb") as stream:
            self._descriptor = os.dup(stream.fileno())
            self._map = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)
        self.tokens: NDArray[Any] = np.frombuffer(self._map, file.dtype, file.count, file.offset_bytes)
        self.opened = self._signature()

    def __del__(self) -> None:
        if (descriptor := getattr(self, "_descriptor", None)) is not None:
            os.close(descriptor)

    def require_unchanged(self) -> None:
        """Raises DataError if the file has been written to since it was opened. A file that was cut short would kill the process
        that reads the map beyond its end, so call this before."""
        if self._signature() != self.opened:
            what = "cut short" if os.fstat(self._descriptor).st_size < self.opened[0] else "changed"
            raise DataError(f"{self.file.name} was {what} while it was in use; put it back as it was, and start again")

    def _signature(self) -> tuple[int, int]:
        status = os.fstat(self._descriptor)
        return status.st_size, status.st_mtime_ns


def windows(tokens: NDArray[Any], starts: NDArray[np.int64], length: int) -> NDArray[Any]:
    """Returns the `length` tokens from each of `starts` on, [R, length], copied once. Raises IndexError beyond the end."""
    item = tokens.itemsize
    every = np.ndarray((len(tokens) - length + 1, length), tokens.dtype, tokens, 0, (item, item))
    return every[starts]


class MappedTokens:
    """The ids `start` .. `stop` - 1 of the files `parts`, which follow each other."""

    def __init__(self, parts: Sequence[MappedFile], start: int = 0, stop: int | None = None) -> None:
        self.parts = list(parts)
        self._begins: NDArray[np.int64] = np.cumsum([0, *(len(part.tokens) for part in parts)], dtype=np.int64)
        self.begins: list[int] = self._begins[:-1].tolist()
        """The number of the first id of each file."""
        self.start, self.stop = start, int(self._begins[-1]) if stop is None else stop
        self._whole = self.parts[0].tokens[self.start : self.stop] if len(self.parts) == 1 else None
        self._dtype = np.result_type(*{part.tokens.dtype for part in parts})

    def __len__(self) -> int:
        return self.stop - self.start

    def require_unchanged(self) -> None:
        """Raises DataError if a file has changed since it was opened."""
        for part in self.parts:
            part.require_unchanged()

    def __getitem__(self, wanted: slice) -> NDArray[Any]:
        """Returns the ids of the slice `wanted`, whose step is ignored: a view if they lie in one file."""
        if self._whole is not None:
            return self._whole[wanted]
        start, stop, _ = wanted.indices(len(self))
        start, stop = start + self.start, max(start, stop) + self.start
        first = int(np.searchsorted(self._begins, start, "right")) - 1
        pieces = []
        for part, begin in zip(self.parts[first:], self.begins[first:], strict=True):
            if begin >= stop:
                break
            pieces.append(part.tokens[max(0, start - begin) : stop - begin])
        return pieces[0] if len(pieces) == 1 else np.concatenate([*pieces, self.parts[0].tokens[:0]])

    def windows(self, starts: NDArray[np.int64], length: int) -> NDArray[Any]:
        """Returns the `length` ids from each of `starts` on, [R, length], copied. Raises DataError if a file has changed since it
        was opened, IndexError beyond the end."""
        self.require_unchanged()
        if self._whole is not None:
            return windows(self._whole, starts, length)
        starts = starts + self.start
        first, last = (np.searchsorted(self._begins, at, "right") - 1 for at in (starts, starts + length - 1))
        found = np.empty((len(starts), length), self._dtype)
        for number in set(first[first == last].tolist()):
            inside = (first == number) & (last == number)
            found[inside] = windows(self.parts[number].tokens, starts[inside] - self.begins[number], length)
        for row in np.flatnonzero(first != last).tolist():
            start = int(starts[row]) - self.start
            found[row] = self[start : start + length]
        return found


AnyTokens: TypeAlias = NDArray[Any] | Tokens | MappedTokens
"""A flat array of tokens, in memory or on storage."""

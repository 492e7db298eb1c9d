"""Tells where documents begin in an array of tokens."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray


class Documents(Protocol):
    """Where documents begin in the tokens of a split."""

    def starts(self, first: int, tokens: NDArray[Any]) -> NDArray[np.int64]:
        """Returns the places in `tokens`, the tokens of the split from number `first` on, at which a document begins, ascending and
        without the place 0."""
        ...


@dataclass(frozen=True)
class EndToken:
    """Each document ends with the id `end`."""

    end: int

    def starts(self, first: int, tokens: NDArray[Any]) -> NDArray[np.int64]:
        return np.flatnonzero(tokens[:-1] == self.end).astype(np.int64) + 1


@dataclass(frozen=True)
class IndexedDocuments:
    """The documents of consecutive files. `begins` [files]: the number of the first token of each file. `indices`: for each file
    the offsets [documents] of its documents in bytes, ascending, and the size of a token in bytes."""

    begins: Sequence[int]
    indices: Sequence[tuple[NDArray[np.int64], int]]
    skipped: int = 0
    """The tokens before the split."""

    def starts(self, first: int, tokens: NDArray[Any]) -> NDArray[np.int64]:
        first += self.skipped
        found: list[NDArray[np.int64]] = []
        file = max(0, int(np.searchsorted(self.begins, first, "right")) - 1)
        while file < len(self.begins) and self.begins[file] < first + len(tokens):
            (offsets, item), begin = self.indices[file], self.begins[file]
            after, stop = (first - begin) * item + 1, (first - begin + len(tokens)) * item
            low, high = np.searchsorted(offsets, [after, stop])
            found.append(np.asarray(offsets[low:high], np.int64) // item + (begin - first))
            file += 1
        return np.unique(np.concatenate(found))  # an empty document begins where the next one does

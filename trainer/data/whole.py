"""Sequences of whole documents: how documents are put together, and how a sequence is read.

Shapes: S positions of a sequence, D documents, R sequences.
"""

import io
from array import array
from bisect import bisect_left, insort
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from bagualu.fault_tolerance.files import write_atomic
from bagualu.trainer.data.mapped import AnyTokens

_AT_ONCE = 2**12
"""The number of documents whose answers are counted together."""
_PACKED_AT_ONCE = 2**16


def pack(sizes: NDArray[np.int64], room: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Puts documents of `sizes` [D], each at most `room`, into sequences of `room` positions. Returns the numbers of the documents
    [D], one sequence after the other, and where each sequence begins in them [R + 1].

    Best fit decreasing: each document, the longest first, goes where it leaves the least room (Johnson, Near-optimal bin packing
    algorithms, 1973; used for training by arXiv 2404.10830). It takes time in proportion to D, and memory of a few numbers
    for each document.
    """
    sizes = np.maximum(sizes, 1)  # a document of one token predicts nothing, but lies somewhere
    longest_first = np.argsort(-sizes, kind="stable")
    bins = np.empty(len(sizes), np.int64)  # of the documents in `longest_first`
    count = 0
    open_bins: dict[int, array[int]] = {}  # by what is left in them
    rooms: list[int] = []  # the keys of open_bins, ascending
    for first in range(0, len(sizes), _PACKED_AT_ONCE):
        portion = longest_first[first : first + _PACKED_AT_ONCE]
        for place, size in enumerate(sizes[portion].tolist(), first):
            at = bisect_left(rooms, size)
            if at == len(rooms):
                number, left = count, room
                count += 1
            else:
                left = rooms[at]
                number = open_bins[left].pop()
                if not open_bins[left]:
                    del open_bins[left], rooms[at]
            bins[place] = number
            left -= size
            if left:
                if left not in open_bins:
                    open_bins[left] = array("q")
                    insort(rooms, left)
                open_bins[left].append(number)
    order = longest_first[np.argsort(bins, kind="stable")]
    begins = np.zeros(count + 1, np.int64)
    np.cumsum(np.bincount(bins, minlength=count), out=begins[1:])
    return order, begins


def trained_sizes(starts: NDArray[np.int64], length: int) -> NDArray[np.int64]:
    """Returns how many positions each document takes [D], given the first token of each and the end [D + 1]: one less than it has
    tokens, as its last token is only predicted; at most `length`, the rest is cut off."""
    sizes: NDArray[np.int64] = np.clip(np.diff(starts) - 1, 0, length)
    return sizes


@dataclass(frozen=True)
class Documented:
    """What a prepared corpus says of the documents in a split. `starts` and `answers` as in `WholeSequences`."""

    starts: AnyTokens
    answers: AnyTokens | None
    packed: Path
    """Prefix of the files that hold how documents are put together."""

    def without_labels(self, length: int) -> int:
        """Returns how many documents have no answer within the positions that they take in sequences of `length`, so that they
        train nothing. Raises DataError, StorageError."""
        if self.answers is None:
            return 0
        lost = 0
        for first in range(0, len(self.starts) - 1, _AT_ONCE):
            starts = self.starts[first : first + _AT_ONCE + 1]
            wanted = self.answers[int(starts[0]) : int(starts[-1])] != 0
            before = np.concatenate(([0], np.cumsum(wanted)))
            begins, ends = starts[:-1] - starts[0], starts[1:] - starts[0]
            predicted = np.minimum(begins + 1, ends), np.minimum(begins + 1 + length, ends)  # from the second token on
            lost += int((before[predicted[0]] == before[predicted[1]]).sum())
        return lost

    def sequences(self, tokens: AnyTokens, length: int) -> "WholeSequences":
        """Returns sequences of `length` positions; puts the documents together if no process has done it before. Raises OSError."""
        paths = [self.packed.with_name(f"{self.packed.name}-{length}-{name}.npy") for name in ("order", "begins")]
        if not all(path.exists() for path in paths):
            for path, array in zip(paths, pack(trained_sizes(self.starts[:], length), length), strict=True):
                stream = io.BytesIO()
                np.save(stream, array)
                write_atomic(path, stream.getvalue())
        order, begins = (np.load(path, mmap_mode="r") for path in paths)
        return WholeSequences(tokens, self.starts, self.answers, (order, begins), length)


class WholeSequences:
    """Sequences of whole documents of `tokens`. `starts` [D + 1]: the first token of each document, and the end. `answers`: for
    each token 1 if it is to be predicted; None: all are. `packed`: the result of `pack`."""

    def __init__(
        self,
        tokens: AnyTokens,
        starts: AnyTokens,
        answers: AnyTokens | None,
        packed: tuple[NDArray[np.int64], NDArray[np.int64]],
        length: int,
    ) -> None:
        self._tokens, self._starts, self._answers, self._length = tokens, starts, answers, length
        self._order, self._begins = packed

    def __len__(self) -> int:
        return len(self._begins) - 1

    def fill(
        self, index: int, inputs: NDArray[np.int64], labels: NDArray[np.int64], begins: NDArray[np.int64], ignored: int
    ) -> None:
        """Sets inputs, labels and where the document of each position begins, each [S], of sequence `index`. The label `ignored`
        stands where nothing is predicted: in front of what is no answer, and in what is left over at the end, where each position
        is a document of its own. Raises DataError, StorageError."""
        at = 0
        for document in self._order[self._begins[index] : self._begins[index + 1]].tolist():
            first, end = self._starts[document : document + 2].tolist()
            size = min(end - first - 1, self._length)
            after = at + max(size, 1)
            if size < 1:  # it predicts nothing
                inputs[at], labels[at], begins[at] = 0, ignored, at
            else:
                tokens = self._tokens[first : first + size + 1]
                inputs[at:after], labels[at:after], begins[at:after] = tokens[:-1], tokens[1:], at
                if self._answers is not None:
                    labels[at:after][self._answers[first + 1 : first + size + 1] == 0] = ignored
            at = after
        inputs[at:], labels[at:], begins[at:] = 0, ignored, np.arange(at, self._length)

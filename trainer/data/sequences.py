"""Sets of token sequences, of which many are read at once.

Shapes: S tokens that a sequence predicts, R sequences of a read.
"""

from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from bagualu.trainer.data.mapped import AnyTokens, MappedTokens, windows
from bagualu.trainer.data.order import random_words
from bagualu.trainer.data.prepared import DataError, Tokens

TRAINING_TOKENS, VALIDATION_TOKENS = 1, 2
"""Streams of random numbers (`random_words`); 0 is that of the order."""
RANDOM_SEQUENCES = 2**31
"""The number of sequences that a set of random sequences reports, although it never runs out; validation sequences are spread
over that many."""


class Sequences(Protocol):
    """An indexed set of token sequences."""

    def __len__(self) -> int: ...

    def read(self, indices: NDArray[np.int64]) -> NDArray[Any]:
        """Returns the tokens of the sequences `indices` [R, S + 1]: the inputs and, shifted by one, the labels; R is not 0. Raises
        DataError, which names a sequence, if tokens have changed since they were opened, StorageError if they cannot be read."""
        ...


class StoredSequences:
    """Consecutive windows of a token array: each token but the first is predicted once, and fewer than S at the end are unused.
    `source`: the name of the source, for messages."""

    def __init__(self, tokens: AnyTokens, sequence_length: int, source: str) -> None:
        self._tokens, self._length, self._source = tokens, sequence_length, source

    def __len__(self) -> int:
        return max(len(self._tokens) - 1, 0) // self._length

    def read(self, indices: NDArray[np.int64]) -> NDArray[Any]:
        starts, size = indices * self._length, self._length + 1
        if isinstance(self._tokens, MappedTokens):
            try:
                return self._tokens.windows(starts, size)
            except DataError as error:
                raise lost(int(indices[0]), self._source, error) from error
        if isinstance(self._tokens, Tokens):
            return np.stack([self._verified(self._tokens, index) for index in indices.tolist()])
        return windows(self._tokens, starts, size)

    def _verified(self, tokens: Tokens, index: int) -> NDArray[Any]:
        start = index * self._length
        try:
            return tokens[start : start + self._length + 1]
        except DataError as error:
            raise lost(index, self._source, error) from error


class RandomSequences:
    """Sequences of uniform random tokens, a function of (seed, stream, sequence index)."""

    def __init__(self, vocab: int, sequence_length: int, seed: int, stream: int) -> None:
        self._vocab, self._length, self._seed, self._stream = vocab, sequence_length, seed, stream

    def __len__(self) -> int:
        return RANDOM_SEQUENCES

    def read(self, indices: NDArray[np.int64]) -> NDArray[Any]:
        words = [random_words(self._seed, index, self._stream, self._length + 1) for index in indices.tolist()]
        return np.stack(words) % np.uint64(self._vocab)


def lost(index: int, source: str, error: DataError) -> DataError:
    """Returns the error for a sequence whose tokens have changed."""
    return DataError(f"sequence {index} of data.source={source} is lost: {error}")

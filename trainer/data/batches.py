"""Determines which sequences make up a step, and reads their tokens.

Shapes: S tokens that a sequence predicts, N sequences of the training split.

Everything is a pure function of (seed, step, sample index). No position is stored: a run resumes at step k by asking for step k,
and each rank asks only for its part of the global batch. Steps and samples count from 0.
"""

from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from bagualu.comm.errors import RecipeError
from bagualu.trainer.data.config import RANDOM, DataConfig
from bagualu.trainer.data.corpus import Corpus, require_sequence
from bagualu.trainer.data.mapped import AnyTokens, MappedTokens
from bagualu.trainer.data.prepared import DataError

RANDOM_SEQUENCES = 2**31
"""The number of sequences that a set of random sequences reports, although it never runs out; validation sequences are spread
over that many."""

# Separate streams of random numbers: the top word of the generator's 256-bit counter.
_ORDER, _TRAINING_TOKENS, _VALIDATION_TOKENS = 0, 1, 2

_ROUNDS = 8
"""Rounds of the permutation: four make a Feistel network as good as random on large domains, small domains need more."""


class Sequences(Protocol):
    """An indexed set of token sequences."""

    def __len__(self) -> int: ...

    def read(self, index: int) -> NDArray[Any]:
        """Returns the tokens of sequence `index`, [S + 1]: the inputs and, shifted by one, the labels."""
        ...


class StoredSequences:
    """Consecutive windows of a token array: each token but the first is predicted once, and fewer than S at the end are unused."""

    def __init__(self, tokens: AnyTokens, sequence_length: int) -> None:
        self._tokens, self._length = tokens, sequence_length

    def __len__(self) -> int:
        return max(len(self._tokens) - 1, 0) // self._length

    def read(self, index: int) -> NDArray[Any]:
        start = index * self._length
        if isinstance(self._tokens, MappedTokens):
            self._tokens.require_unchanged()
        return self._tokens[start : start + self._length + 1]


class RandomSequences:
    """Sequences of uniform random tokens, a function of (seed, stream, sequence index)."""

    def __init__(self, vocab: int, sequence_length: int, seed: int, stream: int) -> None:
        self._vocab, self._length, self._seed, self._stream = vocab, sequence_length, seed, stream

    def __len__(self) -> int:
        return RANDOM_SEQUENCES

    def read(self, index: int) -> NDArray[Any]:
        return _random_words(self._seed, index, self._stream, self._length + 1) % np.uint64(self._vocab)


class Batches:
    """Global batches of `config.global_batch` sequences of a corpus.

    Sequences come in a new random order each epoch, each exactly once; a global batch may contain the end of an epoch and
    the beginning of the next. Random tokens are never repeated: sample n of the run is random sequence n.

    Inputs and labels are int64. A label of -100 means that the position is not predicted. This class produces no such label, but a
    loss must skip it and average over the other positions only.
    """

    def __init__(self, corpus: Corpus, config: DataConfig, seed: int) -> None:
        """Raises RecipeError when a split of the corpus is shorter than one sequence."""
        self._seed, self._global_batch, self._length = seed, config.global_batch, config.sequence_length
        self._vocab, self._source = corpus.vocab, config.source
        self._shuffled = config.source != RANDOM
        self._ids: tuple[int, NDArray[np.int64]] | None = None
        """The latest step that `batch` was called for, and its `sample_ids`; None before the first call."""
        self._train: Sequences
        self._validation: Sequences
        if self._shuffled:
            require_sequence(corpus, config)
            self._train = StoredSequences(corpus.train, self._length)
            self._validation = StoredSequences(corpus.validation, self._length)
        else:
            self._train = RandomSequences(corpus.vocab, self._length, seed, _TRAINING_TOKENS)
            self._validation = RandomSequences(corpus.vocab, self._length, seed, _VALIDATION_TOKENS)

    @property
    def train_count(self) -> int:
        """The number of sequences in an epoch, N."""
        return len(self._train)

    @property
    def validation_count(self) -> int:
        return len(self._validation)

    def sample_ids(self, step: int) -> NDArray[np.int64]:
        """Returns the indices of the training sequences that step `step` consumes, in order, [global_batch]."""
        positions = np.arange(step * self._global_batch, (step + 1) * self._global_batch, dtype=np.int64)
        if not self._shuffled:
            return positions
        epochs, offsets = np.divmod(positions, self.train_count)
        ids = np.empty_like(positions)
        for epoch in np.unique(epochs):
            in_epoch = epochs == epoch
            ids[in_epoch] = _shuffle(offsets[in_epoch], self.train_count, self._seed, int(epoch))
        return ids

    def batch(self, step: int, start: int, count: int) -> tuple[Tensor, Tensor]:
        """Returns inputs and labels [count, S] of samples start .. start + count - 1 of the global batch of step `step`. Raises
        ValueError outside the batch, DataError if tokens have changed, StorageError if they cannot be read, RecipeError for a token
        >= vocab."""
        if not 0 <= start <= start + count <= self._global_batch:
            raise ValueError(f"samples {start}..{start + count} lie outside the global batch of {self._global_batch}")
        if self._ids is None or self._ids[0] != step:
            self._ids = step, self.sample_ids(step)
        return self._read(self._train, self._ids[1][start : start + count])

    def validation(self, start: int, count: int) -> tuple[Tensor, Tensor]:
        """Returns inputs and labels [count, S] of validation sequences start .. start + count - 1, in the order of the files.
        Raises as `batch` does."""
        if not 0 <= start <= start + count <= self.validation_count:
            raise ValueError(f"sequences {start}..{start + count} lie outside the {self.validation_count} there are")
        return self._read(self._validation, np.arange(start, start + count))

    def _read(self, sequences: Sequences, ids: NDArray[np.int64]) -> tuple[Tensor, Tensor]:
        tokens = np.empty((len(ids), self._length + 1), np.int64)
        for row, index in enumerate(ids):
            try:
                tokens[row] = sequences.read(int(index))
            except DataError as error:
                raise DataError(f"sequence {index} of data.source={self._source} is lost: {error}") from error
        if tokens.size and tokens.max() >= self._vocab:  # the loss would be silently wrong: no rank holds such a row
            index = int(ids[tokens.max(axis=1).argmax()])
            raise RecipeError(f"sequence {index} of data.source={self._source} has token {tokens.max()}, but model.vocab="
                              f"{self._vocab}; give an empty data.cache, in which it is prepared anew")  # fmt: skip
        both = torch.from_numpy(tokens)
        return both[:, :-1].contiguous(), both[:, 1:].contiguous()


def _shuffle(positions: NDArray[np.int64], count: int, seed: int, epoch: int) -> NDArray[np.int64]:
    """Returns the index of the sequence at each of the `positions`, all below `count`, of an epoch: a permutation, computed for
    each position separately.

    A Feistel network permutes the numbers below the smallest 4 ** n >= count; a result outside `count` goes through it again until
    it is inside (cycle walking; Black and Rogaway, Ciphers with Arbitrary Finite Domains, 2002). So no array as long as the corpus
    is stored.
    """
    half = np.uint64(max(1, ((count - 1).bit_length() + 1) // 2))
    low = (np.uint64(1) << half) - np.uint64(1)
    keys = _random_words(seed, epoch, _ORDER, _ROUNDS)
    shuffled = positions.astype(np.uint64)
    outside = np.ones(len(shuffled), bool)
    while outside.any():
        left, right = shuffled[outside] >> half, shuffled[outside] & low
        for key in keys:
            left, right = right, left ^ (_mixed(right ^ key) & low)
        shuffled[outside] = left << half | right
        outside = shuffled >= count
    return shuffled.astype(np.int64)


def _mixed(words: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Mixes the bits of each word: every bit of a result depends on every bit of its word (the finaliser of SplitMix64)."""
    words = (words ^ words >> np.uint64(30)) * np.uint64(0xBF58476D1CE4E5B9)
    words = (words ^ words >> np.uint64(27)) * np.uint64(0x94D049BB133111EB)
    return words ^ words >> np.uint64(31)


def _random_words(seed: int, index: int, stream: int, count: int) -> NDArray[np.uint64]:
    """Returns `count` random 64-bit words, a function of the other three arguments."""
    key = np.array([seed % 2**64, index], np.uint64)
    return np.random.Philox(key=key, counter=np.array([0, 0, 0, stream], np.uint64)).random_raw(count)

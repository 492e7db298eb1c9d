"""Determines which sequences make up a step, and reads their tokens.

Shapes: S tokens that a sequence predicts, N sequences of the training split.

Everything is a pure function of (seed, step, sample index), in a blend also of the weights so far. No position is stored: a run
resumes at step k by asking for step k, and each rank asks only for its part of the global batch. Steps and samples count from 0.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, pairwise
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from bagualu.comm.errors import RecipeError
from bagualu.parallel.vocabulary import IGNORED
from bagualu.trainer.data.blend import BlendHistory, Period
from bagualu.trainer.data.config import DOCUMENTS, RANDOM, STREAM, WHOLE, DataConfig
from bagualu.trainer.data.documents import Documents
from bagualu.trainer.data.mapped import AnyTokens, MappedTokens
from bagualu.trainer.data.prepared import DataError
from bagualu.trainer.data.requirements import require_sequence
from bagualu.trainer.data.tokenised import Corpus
from bagualu.trainer.data.whole import WholeSequences

SOURCE_IDS = 2**44
"""More than the sequences of any source."""
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

    def check(self) -> None:
        """Raises DataError if the tokens have changed since they were opened. Call before `read`."""
        ...

    def read(self, index: int) -> NDArray[Any]:
        """Returns the tokens of sequence `index`, [S + 1]: the inputs and, shifted by one, the labels."""
        ...


class StoredSequences:
    """Consecutive windows of a token array: each token but the first is predicted once, and fewer than S at the end are unused."""

    def __init__(self, tokens: AnyTokens, sequence_length: int) -> None:
        self._tokens, self._length = tokens, sequence_length

    def __len__(self) -> int:
        return max(len(self._tokens) - 1, 0) // self._length

    def check(self) -> None:
        if isinstance(self._tokens, MappedTokens):
            self._tokens.require_unchanged()

    def read(self, index: int) -> NDArray[Any]:
        start = index * self._length
        return self._tokens[start : start + self._length + 1]


class RandomSequences:
    """Sequences of uniform random tokens, a function of (seed, stream, sequence index)."""

    def __init__(self, vocab: int, sequence_length: int, seed: int, stream: int) -> None:
        self._vocab, self._length, self._seed, self._stream = vocab, sequence_length, seed, stream

    def __len__(self) -> int:
        return RANDOM_SEQUENCES

    def check(self) -> None:
        """Random tokens cannot change."""

    def read(self, index: int) -> NDArray[Any]:
        return _random_words(self._seed, index, self._stream, self._length + 1) % np.uint64(self._vocab)


@dataclass(frozen=True)
class _Source:
    """A source of a run, open for reading."""

    name: str
    train: Sequences | WholeSequences
    validation: Sequences | WholeSequences
    documents: tuple[Documents, Documents] | None
    """Where documents begin in both splits, if rows are to tell."""


class Batches:
    """Global batches of `config.global_batch` sequences of a corpus.

    Sequences come in a new random order each epoch, each exactly once; a global batch may contain the end of an epoch and
    the beginning of the next. Random tokens are never repeated: sample n of the run is random sequence n. In a blend, each source
    has epochs of its own (blend.py).

    Inputs and labels are int64. A label of -100 means that the position is not predicted: a loss must skip it and average over the
    other positions only. Unless data.packing=stream these are the last positions of documents, and a third tensor tells for each
    position at which position of the row its document begins.
    """

    def __init__(self, corpus: Corpus, config: DataConfig, seed: int) -> None:
        """Raises RecipeError when a split of the corpus, or of a source of a blend, is shorter than one sequence."""
        self._seed, self._global_batch, self._length = seed, config.global_batch, config.sequence_length
        self._vocab, self._tells = corpus.vocab, config.packing != STREAM
        self._shuffled = config.source != RANDOM
        named = [(part.source, part.corpus) for part in corpus.blend] or [(config.source, corpus)]
        self._sources = [self._open(name, part, config) for name, part in named]
        self._history = BlendHistory([corpus.period], self._global_batch) if corpus.blend else None
        self._kept: tuple[int, BlendHistory | None, tuple[NDArray[np.int64], NDArray[np.int64]]] | None = None
        """The latest step that `batch` was called for, the history then, and the step's samples; None before the first call."""
        self._numbers = {part.corpus.fingerprint: number for number, part in enumerate(corpus.blend)}

    def _open(self, name: str, corpus: Corpus, config: DataConfig) -> _Source:
        documents = corpus.documents if config.packing == DOCUMENTS else None
        if not self._shuffled:
            streams = _TRAINING_TOKENS, _VALIDATION_TOKENS
            drawn, held_out = (RandomSequences(corpus.vocab, self._length, self._seed, stream) for stream in streams)
            return _Source(name, drawn, held_out, None)
        if config.packing == WHOLE:
            assert corpus.whole is not None
            first, second = corpus.whole
            packed = first.sequences(corpus.train, self._length), second.sequences(corpus.validation, self._length)
            return _Source(name, *packed, None)
        require_sequence(corpus, replace(config, source=name))
        train, validation = (StoredSequences(tokens, self._length) for tokens in (corpus.train, corpus.validation))
        return _Source(name, train, validation, documents)

    @property
    def train_count(self) -> int:
        """The number of sequences in an epoch, N; of a blend, of all sources together."""
        return sum(len(source.train) for source in self._sources)

    @property
    def validation_count(self) -> int:
        return sum(len(source.validation) for source in self._sources)

    @property
    def validation_sets(self) -> dict[str, range]:
        """The validation sequences of each source by its name."""
        ends = list(accumulate((len(source.validation) for source in self._sources), initial=0))
        return {source.name: range(*span) for source, span in zip(self._sources, pairwise(ends), strict=True)}

    def blend(self) -> list[dict[str, Any]] | None:
        """Returns what a checkpoint holds for `resume`; None without a blend."""
        return None if self._history is None else self._history.as_json()

    def resume(self, saved: Sequence[Period], step: int) -> None:
        """Goes on with a blend after `step` steps: those before mixed sources as `saved` says."""
        assert self._history is not None
        self._history = self._history.resumed(saved, step)

    def sample_ids(self, step: int) -> NDArray[np.int64]:
        """Returns the indices of the training sequences that step `step` consumes, in order, [global_batch]. In a blend, the number
        of the source times SOURCE_IDS is added."""
        sources, indices = self._samples(step)
        return indices + sources * SOURCE_IDS

    def _samples(self, step: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Returns for each sample of step `step` the number of its source and the index of its sequence, [global_batch]."""
        positions = np.arange(step * self._global_batch, (step + 1) * self._global_batch, dtype=np.int64)
        owners = np.zeros_like(positions)
        if self._history is not None:
            period, which, positions = self._history.samples(step)
            owners = np.array([self._numbers.get(fingerprint, -1) for fingerprint in period.fingerprints], np.int64)[which]
            if owners.min() < 0:
                gone = period.sources[int(which[owners.argmin()])]
                raise RecipeError(f"step {step + 1} read data.source={gone}, which data.blend no longer has; put it back")
        if not self._shuffled:
            return owners, positions
        indices = np.empty_like(positions)
        for number in np.unique(owners).tolist():
            count = len(self._sources[number].train)
            epochs, offsets = np.divmod(positions, count)
            for epoch in np.unique(epochs[owners == number]).tolist():
                chosen = (owners == number) & (epochs == epoch)
                indices[chosen] = _shuffle(offsets[chosen], count, self._seed, epoch)
        return owners, indices

    def batch(self, step: int, start: int, count: int) -> tuple[Tensor, ...]:
        """Returns inputs, labels and, unless data.packing=stream, where documents begin, each [count, S], of samples start ..
        start + count - 1 of the global batch of step `step`. Raises ValueError outside the batch, DataError if tokens have changed,
        StorageError if they cannot be read, RecipeError for a token >= vocab."""
        if not 0 <= start <= start + count <= self._global_batch:
            raise ValueError(f"samples {start}..{start + count} lie outside the global batch of {self._global_batch}")
        owners, indices = self._latest(step)
        chosen = slice(start, start + count)
        sources = (self._sources[number] for number in owners[chosen].tolist())
        return self._read([(source, index) for source, index in zip(sources, indices[chosen].tolist(), strict=True)], 0)

    def _latest(self, step: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Returns `_samples(step)`, computed once for the micro-batches of a step."""
        kept = self._kept
        if kept is None or kept[0] != step or kept[1] is not self._history:
            kept = self._kept = step, self._history, self._samples(step)  # in one go: another thread may read ahead
        return kept[2]

    def validation(self, start: int, count: int) -> tuple[Tensor, ...]:
        """Returns the same of validation sequences start .. start + count - 1, in the order of the sources and their files. Raises
        as `batch` does."""
        if not 0 <= start <= start + count <= self.validation_count:
            raise ValueError(f"sequences {start}..{start + count} lie outside the {self.validation_count} there are")
        sets = list(zip(self._sources, self.validation_sets.values(), strict=True))
        wanted = range(start, start + count)
        return self._read([(source, n - own.start) for n in wanted for source, own in sets if n in own], 1)

    def _read(self, rows: Sequence[tuple[_Source, int]], split: int) -> tuple[Tensor, ...]:
        """Returns inputs, labels and, if rows tell, where documents begin, of the sequences with these indices in split 0
        (training) or 1 (validation) of their sources."""
        inputs, labels, begins = (np.zeros((len(rows), self._length), np.int64) for _ in range(3))
        checked: set[str] = set()
        for row, (source, index) in enumerate(rows):
            sequences = source.validation if split else source.train
            try:
                if source.name not in checked:
                    sequences.check()
                    checked.add(source.name)
                if isinstance(sequences, WholeSequences):
                    sequences.fill(index, inputs[row], labels[row], begins[row], IGNORED)
                    continue
                tokens = sequences.read(index)
            except DataError as error:
                raise DataError(f"sequence {index} of data.source={source.name} is lost: {error}") from error
            inputs[row], labels[row] = tokens[:-1], tokens[1:]
            if source.documents is not None:
                self._separate(source.documents[split].starts(index * self._length, tokens), labels[row], begins[row])
        self._require_vocabulary(rows, inputs, labels)
        tensors = (inputs, labels, begins) if self._tells else (inputs, labels)
        return tuple(map(torch.from_numpy, tensors))

    def _separate(self, starts: NDArray[np.int64], labels: NDArray[np.int64], begins: NDArray[np.int64]) -> None:
        """Given the places `starts` of a row at which documents begin, sets `begins` [S], the place at which the document of each
        position begins, and changes `labels` [S]: the last position of a document predicts nothing."""
        inside = starts[starts < self._length]
        labels[starts - 1], begins[inside] = IGNORED, inside
        np.maximum.accumulate(begins, out=begins)

    def _require_vocabulary(
        self, rows: Sequence[tuple[_Source, int]], inputs: NDArray[np.int64], labels: NDArray[np.int64]
    ) -> None:
        """Raises RecipeError for a token that is not in the vocabulary: the loss would be silently wrong, since no rank holds such
        a row of the head."""
        if not rows or max(inputs.max(), labels.max()) < self._vocab:
            return
        largest = np.maximum(inputs.max(axis=1), labels.max(axis=1))
        source, index = rows[int(largest.argmax())]
        raise RecipeError(f"sequence {index} of data.source={source.name} has token {largest.max()}, but model.vocab="
                          f"{self._vocab}; give an empty data.cache, in which it is prepared anew")  # fmt: skip


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

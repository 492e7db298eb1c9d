"""Determines which sequences make up a step, and reads their tokens.

Shapes: S tokens that a sequence predicts, N sequences of the training split.

Everything is a pure function of (seed, step, sample index), in a blend also of the weights so far. No position is stored: a run
resumes at step k by asking for step k, and each rank asks only for its part of the global batch. Steps and samples count from 0.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, pairwise
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from bagualu.comm.errors import RecipeError
from bagualu.parallel.vocabulary import IGNORED
from bagualu.trainer.data.blend import BlendHistory, Period
from bagualu.trainer.data.config import DOCUMENTS, RANDOM, STREAM, WHOLE, DataConfig
from bagualu.trainer.data.documents import Documents
from bagualu.trainer.data.order import Order
from bagualu.trainer.data.prepared import DataError
from bagualu.trainer.data.requirements import require_sequence
from bagualu.trainer.data.sequences import TRAINING_TOKENS, VALIDATION_TOKENS, RandomSequences, Sequences, StoredSequences, lost
from bagualu.trainer.data.tokenised import Corpus
from bagualu.trainer.data.whole import WholeSequences

SOURCE_IDS = 2**44
"""More than the sequences of any source."""


@dataclass(frozen=True)
class _Source:
    """A source of a run, open for reading."""

    name: str
    train: Sequences | WholeSequences
    validation: Sequences | WholeSequences
    order: Order | None = None
    """The order of its training sequences; None for random tokens, which are taken as they come."""
    documents: tuple[Documents, Documents] | None = None
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
            streams = TRAINING_TOKENS, VALIDATION_TOKENS
            drawn, held_out = (RandomSequences(corpus.vocab, self._length, self._seed, stream) for stream in streams)
            return _Source(name, drawn, held_out)
        if config.packing == WHOLE:
            assert corpus.whole is not None
            first, second = corpus.whole
            packed = first.sequences(corpus.train, self._length), second.sequences(corpus.validation, self._length)
            return _Source(name, *packed, Order(len(packed[0]), self._seed))
        require_sequence(corpus, replace(config, source=name))
        train, validation = (StoredSequences(tokens, self._length, name) for tokens in (corpus.train, corpus.validation))
        return _Source(name, train, validation, Order(len(train), self._seed), documents)

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
        for number in self._present(owners):
            order, own = self._sources[number].order, owners == number
            assert order is not None
            epochs, places = np.divmod(positions[own], order.count)
            found = np.empty_like(places)
            for epoch in range(int(epochs.min()), int(epochs.max()) + 1):  # a step uses consecutive samples of each source
                found[epochs == epoch] = order.at(epoch, places[epochs == epoch])
            indices[own] = found
        return owners, indices

    def _present(self, owners: NDArray[np.int64]) -> list[int]:
        """Returns the numbers of the sources that `owners` names."""
        return np.unique(owners).tolist() if len(self._sources) > 1 else [0] if len(owners) else []

    def batch(self, step: int, start: int, count: int) -> tuple[Tensor, ...]:
        """Returns inputs, labels and, unless data.packing=stream, where documents begin, each [count, S], of samples start ..
        start + count - 1 of the global batch of step `step`. Raises ValueError outside the batch, DataError if tokens have changed,
        StorageError if they cannot be read, RecipeError for a token >= vocab."""
        if not 0 <= start <= start + count <= self._global_batch:
            raise ValueError(f"samples {start}..{start + count} lie outside the global batch of {self._global_batch}")
        owners, indices = self._latest(step)
        chosen = slice(start, start + count)
        return self._read(owners[chosen], indices[chosen], 0)

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
        wanted = np.arange(start, start + count, dtype=np.int64)
        begins = np.array([own.start for own in self.validation_sets.values()], np.int64)
        owners = np.searchsorted(begins, wanted, "right") - 1
        return self._read(owners, wanted - begins[owners], 1)

    def _read(self, owners: NDArray[np.int64], indices: NDArray[np.int64], split: int) -> tuple[Tensor, ...]:
        """Returns inputs, labels and, if rows tell, where documents begin, of the sequences `indices` in split 0 (training) or 1
        (validation) of the sources with the numbers `owners`."""
        inputs, labels = np.empty((2, len(indices), self._length), np.int64)
        begins = np.zeros((len(indices), self._length if self._tells else 0), np.int64)
        for number in self._present(owners):
            source, rows = self._sources[number], np.flatnonzero(owners == number)
            sequences = source.validation if split else source.train
            if isinstance(sequences, WholeSequences):
                for row in rows.tolist():
                    self._fill(source, sequences, int(indices[row]), (inputs[row], labels[row], begins[row]))
                continue
            tokens = sequences.read(indices[rows])
            self._require_vocabulary(source, indices[rows], tokens)  # before they are widened, which takes fewer bytes
            every = slice(None) if len(rows) == len(indices) else rows
            inputs[every], labels[every] = tokens[:, :-1], tokens[:, 1:]
            if source.documents is not None:
                for row, own in zip(rows.tolist(), tokens, strict=True):
                    starts = source.documents[split].starts(int(indices[row]) * self._length, own)
                    self._separate(starts, labels[row], begins[row])
        tensors = (inputs, labels, begins) if self._tells else (inputs, labels)
        return tuple(map(torch.from_numpy, tensors))

    def _fill(self, source: _Source, sequences: WholeSequences, index: int, row: tuple[NDArray[np.int64], ...]) -> None:
        """Sets the inputs, labels and begins in `row`, each [S], of a sequence of whole documents."""
        inputs, labels, begins = row
        try:
            sequences.fill(index, inputs, labels, begins, IGNORED)
        except DataError as error:
            raise lost(index, source.name, error) from error
        self._require_vocabulary(source, np.array([index]), np.maximum(inputs, labels)[None])

    def _separate(self, starts: NDArray[np.int64], labels: NDArray[np.int64], begins: NDArray[np.int64]) -> None:
        """Given the places `starts` of a row at which documents begin, sets `begins` [S], the place at which the document of each
        position begins, and changes `labels` [S]: the last position of a document predicts nothing."""
        inside = starts[starts < self._length]
        labels[starts - 1], begins[inside] = IGNORED, inside
        np.maximum.accumulate(begins, out=begins)

    def _require_vocabulary(self, source: _Source, indices: NDArray[np.int64], tokens: NDArray[Any]) -> None:
        """Raises RecipeError for a token in the rows of `tokens`, those of the sequences `indices`, that is not in the vocabulary:
        the loss would be silently wrong, since no rank holds such a row of the head."""
        if tokens.max() < self._vocab:
            return
        largest = tokens.max(axis=1)
        row = int(largest.argmax())
        raise RecipeError(f"sequence {indices[row]} of data.source={source.name} has token {largest[row]}, but model.vocab="
                          f"{self._vocab}; give an empty data.cache, in which it is prepared anew")  # fmt: skip

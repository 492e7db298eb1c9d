"""The random order of sequences: a pure function of (seed, epoch, position), of which nothing is stored."""

import numpy as np
from numpy.typing import NDArray

_ORDER = 0
"""The stream of random numbers that orders are made with (`random_words`)."""
_ROUNDS = 8
"""Rounds of the permutation: four make a Feistel network as good as random on large domains, small domains need more."""
_AHEAD = 2**12
"""The number of positions that `Order` computes together."""


class Order:
    """The order of `count` sequences in each epoch, a function of `seed`."""

    def __init__(self, count: int, seed: int) -> None:
        self.count, self._seed = count, seed
        self._kept: tuple[int, int, NDArray[np.int64]] | None = None
        """The epoch and the first position of the indices that were computed last, and these indices."""

    def at(self, epoch: int, positions: NDArray[np.int64]) -> NDArray[np.int64]:
        """Returns the index of the sequence at each of the `positions`, all below `count` and close to each other. They are
        computed for the positions of many steps at once: for those of one, calls of numpy take longer than their work."""
        first, stop = int(positions.min()), int(positions.max()) + 1
        kept = self._kept
        if kept is None or kept[0] != epoch or not kept[1] <= first < stop <= kept[1] + len(kept[2]):
            together = np.arange(first, min(max(stop, first + _AHEAD), self.count), dtype=np.int64)
            kept = self._kept = epoch, first, shuffle(together, self.count, self._seed, epoch)  # in one go: threads share it
        return kept[2][positions - kept[1]]


def shuffle(positions: NDArray[np.int64], count: int, seed: int, epoch: int) -> NDArray[np.int64]:
    """Returns the index of the sequence at each of the `positions`, all below `count`, of an epoch: a permutation, computed for
    each position separately.

    A Feistel network permutes the numbers below the smallest 4 ** n >= count; a result outside `count` goes through it again until
    it is inside (cycle walking; Black and Rogaway, Ciphers with Arbitrary Finite Domains, 2002). So no array as long as the corpus
    is stored.
    """
    half = np.uint64(max(1, ((count - 1).bit_length() + 1) // 2))
    low = (np.uint64(1) << half) - np.uint64(1)
    keys = random_words(seed, epoch, _ORDER, _ROUNDS)
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


def random_words(seed: int, index: int, stream: int, count: int) -> NDArray[np.uint64]:
    """Returns `count` random 64-bit words, a function of the other three arguments. `stream`: the top word of the generator's
    256-bit counter, which keeps the words of separate uses apart."""
    key = np.array([seed % 2**64, index], np.uint64)
    return np.random.Philox(key=key, counter=np.array([0, 0, 0, stream], np.uint64)).random_raw(count)

"""Mixes sources of sequences by weight. A change of the weights in the middle of a run loses no sequence and repeats none.

Which source each sample of a run comes from, and which of its sequences, counted from the beginning of the run, is a function of
the weights so far: a list of periods, each with the step at which it begins. Checkpoints hold this list, which is the whole
position. Sources are known by the hash of their tokens, so they may move, join and leave.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bagualu.comm.errors import RecipeError

CYCLE = 2**16
"""Samples after which the order of the sources repeats. Weights are rounded to multiples of 1 / CYCLE."""
EXAMPLE = "[{source: a.bin, weight: 0.7}, {source: b.bin, weight: 0.3}]"
_KEYS = {"source", "weight", "format", "validation"}


@dataclass(frozen=True)
class BlendEntry:
    """An entry of `data.blend`. `format` and `validation` as data.format and data.validation."""

    source: str
    weight: float
    format: str | None = None
    validation: str | None = None

    @staticmethod
    def read(entry: Any) -> "BlendEntry":
        """Returns what an entry of the recipe describes. Raises RecipeError for an entry that describes none."""
        example = f"e.g. 'data.blend={EXAMPLE}'"
        if not isinstance(entry, dict) or not isinstance(entry.get("source"), str) or "weight" not in entry:
            raise RecipeError(f"data.blend: {entry} has no source with a weight; {example}")
        for key in entry.keys() - _KEYS:
            raise RecipeError(f"data.blend: {entry} has the unknown key {key}; there are {', '.join(sorted(_KEYS))}, {example}")
        weight = entry["weight"]
        if not isinstance(weight, int | float) or isinstance(weight, bool) or not 0 < weight < float("inf"):
            raise RecipeError(f"data.blend: weight={weight} of {entry['source']} must be a number above 0; {example}")
        for key in ("format", "validation"):
            if not isinstance(entry.get(key), str | None):
                raise RecipeError(f"data.blend: {key}={entry[key]} of {entry['source']} must be text; {example}")
        return BlendEntry(**entry)


@dataclass(frozen=True)
class Period:
    """The steps from `first_step` on, up to the next period. `fingerprints`: of the sources. Not all `weights` are 0."""

    first_step: int
    sources: list[str]
    fingerprints: list[str]
    weights: list[float]

    @cached_property
    def cycle(self) -> "BlendCycle":
        return BlendCycle(self.weights)

    def same(self, other: "Period") -> bool:
        """Whether both mix the same sources by the same weights."""
        return dict(zip(self.fingerprints, self.weights, strict=True)) == dict(zip(other.fingerprints, other.weights, strict=True))


class BlendCycle:
    """The order of the sources in CYCLE samples: those of each source lie as evenly as they can."""

    def __init__(self, weights: Sequence[float]) -> None:
        self.counts = _apportioned(weights)
        owners = np.repeat(np.arange(len(weights)), self.counts)
        numbers = np.concatenate([np.arange(count) for count in self.counts])
        order = np.lexsort((owners, (numbers + 0.5) / self.counts[owners]))
        self.owners, self.numbers = owners[order], numbers[order]

    def at(self, positions: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Returns for each of `positions`, from 0, its source and how many samples of that source come before it."""
        rounds, places = np.divmod(positions, CYCLE)
        owners = self.owners[places]
        return owners, rounds * self.counts[owners] + self.numbers[places]

    def before(self, position: int) -> list[int]:
        """Returns for each source how many samples come before `position`."""
        rounds, place = divmod(position, CYCLE)
        inside = np.bincount(self.owners[:place], minlength=len(self.counts))
        return [int(number) for number in rounds * self.counts + inside]


def _apportioned(weights: Sequence[float]) -> NDArray[np.int64]:
    """Returns CYCLE divided in proportion to `weights` in whole numbers of at least 1: by largest remainders."""
    shares = np.array(weights, np.float64) / sum(weights) * CYCLE
    counts = np.maximum(np.floor(shares).astype(np.int64), 1)
    for _ in range(CYCLE):
        missing = CYCLE - int(counts.sum())
        if not missing:
            break
        rest = shares - counts
        if missing > 0:
            counts[np.argsort(-rest, kind="stable")[:missing]] += 1
        else:  # several weights were rounded up to 1
            counts[int(np.argmax(counts))] -= 1
    return counts


class BlendHistory:
    """The periods of a run, whose steps have `global_batch` samples each."""

    def __init__(self, periods: Sequence[Period], global_batch: int) -> None:
        self.periods, self._global_batch = list(periods), global_batch
        self._taken: list[dict[str, int]] = [{}]
        """For each period the samples of each source before it, by fingerprint."""
        for period, after in pairwise(self.periods):
            used = period.cycle.before((after.first_step - period.first_step) * global_batch)
            taken = dict(self._taken[-1])
            for fingerprint, count in zip(period.fingerprints, used, strict=True):
                taken[fingerprint] = taken.get(fingerprint, 0) + count
            self._taken.append(taken)

    def samples(self, step: int) -> tuple[Period, NDArray[np.int64], NDArray[np.int64]]:
        """Returns the period of `step` (from 0) and, for each sample of the step, the number of its source in the period and how
        many samples of that source come before it in the run, both [global_batch]."""
        index = max(i for i, period in enumerate(self.periods) if i == 0 or period.first_step <= step)
        period = self.periods[index]
        first = (step - period.first_step) * self._global_batch
        owners, numbers = period.cycle.at(np.arange(first, first + self._global_batch, dtype=np.int64))
        before = np.array([self._taken[index].get(fingerprint, 0) for fingerprint in period.fingerprints], np.int64)
        return period, owners, numbers + before[owners]

    def resumed(self, saved: Sequence[Period], step: int) -> "BlendHistory":
        """Returns the history of a run that goes on after `step` steps of a checkpoint, whose periods were `saved`: with the latest
        weights of this history, unless this is what became of those periods later."""
        if self.periods[: len(saved)] == list(saved):
            return self
        now = self.periods[-1]
        earlier = [period for period in saved if period.first_step < step or period.first_step == 0 == step]
        if earlier and earlier[-1].same(now):
            return BlendHistory(earlier, self._global_batch)
        following = Period(step, now.sources, now.fingerprints, now.weights)
        kept = [period for period in earlier if period.first_step < step]
        return BlendHistory([*kept, following], self._global_batch)

    def as_json(self) -> list[dict[str, Any]]:
        return [asdict(period) for period in self.periods]


def read_periods(saved: Any) -> list[Period] | None:
    """Returns the periods that `as_json` wrote; None if `saved` is nothing of the kind."""
    try:
        periods = [Period(**entry) for entry in saved]
        lengths = {len({len(p.sources), len(p.fingerprints), len(p.weights)}) for p in periods}
        ascending = all(a.first_step < b.first_step for a, b in pairwise(periods))
        fine = lengths == {1} and ascending and periods[0].first_step == 0 and all(min(p.weights) > 0 for p in periods)
    except (TypeError, ValueError):
        return None
    return periods if fine else None


def changed_source(saved: Sequence[Period], now: Mapping[str, str]) -> str | None:
    """Returns a source that both the last of the `saved` periods and `now`, which maps sources to fingerprints, have under one
    name, but whose tokens have changed; None if there is none."""
    last = saved[-1]
    known = dict(zip(last.sources, last.fingerprints, strict=True))
    return next((source for source in now if source in known and known[source] not in now.values()), None)

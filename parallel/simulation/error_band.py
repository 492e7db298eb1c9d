"""How far predictions of step times were from measurements of others, for runs like a given one.

recipes/held_out_errors.yaml has the errors of published runs that nothing was fitted to; `python tests/bench/published_runs.py
RUNS.csv --errors FILE` writes it.
"""

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from importlib.resources import files
from math import log2

import numpy as np
import yaml

FILE = "held_out_errors.yaml"
NEAREST = 20
"""The number of runs that a band is taken from."""
PART = 0.8
"""The part of those runs that lies within the band."""
_OTHER_CHIP = 6.0
_OTHER_KIND = 4.0
"""How far apart runs of different chips, or of a dense model and a mixture, count: in doublings of devices or parameters."""
_FAR = 2.0
"""A run is within the range of its neighbours if it has at most this many times the devices and parameters of one of them."""


@dataclass(frozen=True)
class HeldOutError:
    """A published run, to which nothing was fitted, and the error of its prediction."""

    chip: str
    """The name of the chip (`chip.name` of a cluster file), e.g. H100 SXM5 80GB. Several cluster files may have the same."""
    devices: int
    parameters: int
    kind: str
    """dense | moe"""
    error: float
    """Predicted / measured step time - 1."""


@dataclass(frozen=True)
class ErrorBand:
    """Where the measured step time lies for `PART` of the runs nearest to a given one."""

    least: float
    most: float
    """Measured / predicted step time."""
    rows: int
    chips: tuple[str, ...]
    """Those of the nearest runs."""
    devices: tuple[int, int]
    """The fewest and the most devices of the nearest runs."""
    beyond: bool
    """Whether no run on this chip, of this kind, had nearly as many devices and parameters, so that the band is extrapolated."""


def error_band(
    chip: str, devices: int, parameters: int, kind: str, errors: Sequence[HeldOutError] | None = None
) -> ErrorBand | None:
    """Returns the band for a run, from the errors of the runs that are nearest in devices, parameters, chip and kind. None if there
    are none.

    `chip`: its name; that of a mixed cluster has those of all, as no published run does. `kind`: dense or moe. `errors`: by default
    those that ship.
    """
    known = held_out_errors() if errors is None else errors
    if not known:
        return None
    wanted = HeldOutError(chip, devices, parameters, kind, 0.0)
    nearest = sorted(known, key=lambda other: _distance(wanted, other))[:NEAREST]
    outside = (1 - PART) / 2
    ratios = [1 / (1 + other.error) for other in nearest]
    least, most = np.quantile(ratios, [outside, 1 - outside], method="inverted_cdf")  # ratios themselves, not values between them
    counts = [other.devices for other in nearest]
    return ErrorBand(
        least=float(least),
        most=float(most),
        rows=len(nearest),
        chips=tuple(sorted({other.chip for other in nearest})),
        devices=(min(counts), max(counts)),
        beyond=not any(_within(wanted, other) for other in nearest),
    )


@lru_cache(1)
def held_out_errors() -> tuple[HeldOutError, ...]:
    """Returns the errors that ship."""
    return tuple(read_errors((files("bagualu.recipes") / FILE).read_text(encoding="utf-8")))


def read_errors(text: str) -> list[HeldOutError]:
    return [HeldOutError(**row) for row in yaml.safe_load(text)["rows"] or []]


def write_errors(errors: Iterable[HeldOutError], source: str) -> str:
    """Returns the text of the file; `source` says what made it."""
    rows = (json.dumps({**vars(error), "error": round(error.error, 4)}) for error in errors)
    return "\n".join([f"# Made by {source}", "rows:", *(f"  - {row}" for row in rows)]) + "\n"


def _distance(run: HeldOutError, other: HeldOutError) -> float:
    apart = abs(log2(run.devices / other.devices)) + abs(log2(run.parameters / other.parameters))
    return apart + _OTHER_CHIP * (run.chip != other.chip) + _OTHER_KIND * (run.kind != other.kind)


def _within(run: HeldOutError, other: HeldOutError) -> bool:
    close = run.devices <= _FAR * other.devices and run.parameters <= _FAR * other.parameters
    return close and (run.chip, run.kind) == (other.chip, other.kind)

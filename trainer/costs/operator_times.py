"""Times of the variants of an operator on this device, measured once and kept in the user's cache folder."""

import logging
import time
from collections.abc import Callable, Mapping
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

import torch

from bagualu.comm.errors import RecipeError
from bagualu.parallel.precision import chip_of
from bagualu.trainer.costs.cache import kept, on_device
from bagualu.trainer.costs.operator_cases import OperatorCalls, PreparedCall
from bagualu.trainer.costs.throughput import synchronize
from bagualu.trainer.operators.operator_set import is_usable, variant_of
from bagualu.trainer.operators.registry import DEFAULT_VARIANTS, GENERATED, is_float8, variants

FORMAT = 4
"""A number in the KEY of a cache file. Raise it when what is measured, or how it is measured, changes."""
BUDGET_SECONDS = 0.3
"""About the time that the rounds of a case take together, after the first calls."""
_LEAST_ROUNDS = 3
_MOST_ROUNDS = 30
log = logging.getLogger(__name__)


def measurable(operator: str, chip: str) -> dict[str, EntryPoint]:
    """Returns the variants of `operator` that `chip` has and that are measured: not those that have to be generated first, that
    are in float8, or for which this machine lacks something. Raises RecipeError for a variant that cannot be imported."""
    registered = variants(operator, chip).items()
    candidates = {name: entry for name, entry in registered if name != GENERATED and not is_float8(name, operator)}
    return {name: entry for name, entry in candidates.items() if _is_usable(operator, name, chip)}


def _is_usable(operator: str, variant: str, chip: str) -> bool:
    """Returns whether it is usable. A variant of another package that cannot be imported is logged: it is nobody's choice."""
    try:
        return is_usable(operator, variant, chip)
    except RecipeError as error:
        log.warning("%s", error)
        return False


def times_of(case: OperatorCalls, device: torch.device, cache: Path) -> dict[str, float]:
    """Returns the seconds of a call with its backward pass, by variant: of all that are `measurable` and work. They come from the
    cache or are measured and then stored there. Raises RecipeError for a variant that cannot be imported."""
    chip = chip_of(device)
    registered = measurable(case.operator, chip)
    packages = {name: f"{entry.value} {entry.dist.version if entry.dist else ''}" for name, entry in registered.items()}
    return kept(
        cache / "operators",
        {"format": FORMAT, **case.describe(), **on_device(device), "variants": packages},
        measure=lambda: measure(
            case.prepare(device),
            {name: variant_of(case.operator, name, chip) for name in registered},
            DEFAULT_VARIANTS[case.operator],
            device,
        ),
        read=lambda stored: {str(name): float(seconds) for name, seconds in stored.items()},
        plain=lambda seconds: seconds,
    )


def measure(
    call: PreparedCall,
    loaded: Mapping[str, Callable[..., Any]],
    default: str,
    device: torch.device,
    budget_seconds: float = BUDGET_SECONDS,
) -> dict[str, float]:
    """Returns the seconds of each variant of `loaded` but those that fail, which are logged; `default` may not fail.

    They take turns for 3 to 30 rounds, as many as fit into about `budget_seconds`. The least time of each counts, since what
    disturbs the machine only adds to it; the first calls, which may be slow, do not count. A variant that leaves the call to the
    default has the same time."""
    times: dict[str, list[float]] = {}
    alike = [name for name, variant in loaded.items() if name != default and not call.measures(variant)]
    for name, variant in loaded.items():
        if name in alike:
            continue
        try:
            _seconds(call, variant, device)
            times[name] = []
        except Exception as error:
            if name == default:
                raise
            log.warning("the variant %s fails (%s: %s) and is not taken", name, type(error).__name__, error)
    started = time.perf_counter()
    for rounds in range(_MOST_ROUNDS if len(times) > 1 else 1):  # one that has no rival is not timed in earnest
        if rounds >= _LEAST_ROUNDS and time.perf_counter() - started > budget_seconds:
            break
        for name, taken in times.items():
            taken.append(_seconds(call, loaded[name], device))
    least = {name: min(taken) for name, taken in times.items()}
    return {**least, **dict.fromkeys(alike, least[default])}


def _seconds(call: PreparedCall, variant: Callable[..., Any], device: torch.device) -> float:
    synchronize(device)
    started = time.perf_counter()
    output = call.run(variant)
    if call.inputs:
        torch.autograd.grad(output, call.inputs, torch.ones_like(output))
    synchronize(device)
    return time.perf_counter() - started

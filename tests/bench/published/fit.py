"""Fits the efficiencies of products on a chip to step times that were measured with it.

The time of an operator is the longest of three, and each is linear in what is sought: a product its terms (operator_cost.terms_of)
times its FLOPs at the peak, other operators their bytes by the bandwidth that is reached, any a launch. A section of a step takes
the sum of them or, if that is longer, the time in which the host starts its operators: small models are limited by it, and would
otherwise be taken for slow products. So with the present values it is known which of these counts, and a step time is a linear
function of the values, beside what the replay adds: bubbles, communication. Values that fit best are sought until none changes.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from bagualu.comm.calls import Communication
from bagualu.comm.topology import Chip
from bagualu.parallel.simulation.events import Event, Operator, Role
from bagualu.parallel.simulation.operator_cost import (
    FUSED_ATTENTION,
    Product,
    is_attention,
    moved_bytes,
    nonnegative,
    product_of,
    terms_of,
)

Vector = npt.NDArray[np.float64]
ROUNDS = 60
_NEAR = 0.08
"""Rows that are further off count less: they measure something that no value of a chip explains."""


@dataclass(frozen=True)
class Values:
    """What is sought."""

    products: Mapping[str, Vector]
    """For each dtype, the coefficients of the terms of a product."""
    memory_fraction: float
    launch_seconds: float
    dispatch_seconds: float
    """The time in which the host starts an operator."""


@dataclass(frozen=True)
class Part:
    """Sections of a step that are alike."""

    times: float
    """How often they are on the path that determines the step."""
    operators: Mapping[Operator, int]
    calls: int
    """The number of communications."""


@dataclass(frozen=True)
class Measured:
    """A run of a single node: what is on its path, and what it took."""

    chip: Chip
    seconds: float
    parts: Sequence[Part]
    weight: float = 1.0
    rest_seconds: float = 0.0
    """What the replay adds."""


def path_of(role: Role, pipeline: int) -> list[Part]:
    """Returns the sections of the slowest role. Those of the pipeline's program also count for the micro-batches of other ranks
    during which it waits."""
    sections = {id(section.events): section for section in role.trace.sections}
    times: Counter[int] = Counter(id(section.events) for section in role.trace.sections)
    waits = 1 + (pipeline - 1) / role.micro_batches
    return [
        Part(times[key] * (waits if section.action is not None else 1.0), _operators(section.events), _calls(section.events))
        for key, section in sections.items()
    ]


def _operators(events: Sequence[Event]) -> Counter[Operator]:
    return Counter(event for event in events if isinstance(event, Operator))


def _calls(events: Sequence[Event]) -> int:
    return sum(isinstance(event, Communication) for event in events)


def fit(runs: Sequence[Measured], start: Values, group: Mapping[str, str]) -> Values:
    """Returns the values that fit the runs best. `group`: for each dtype of products, the name of its coefficients."""
    arrays = [_Run(run, group, start) for run in runs]
    measured = np.array([run.seconds for run in runs])
    counted = np.array([run.weight for run in runs])
    keys = [(name, index) for name, vector in start.products.items() for index in range(len(vector))]
    keys += [(name, 0) for name in _REST]
    values = start
    for _ in range(ROUNDS):
        rows = [run.linear(values) for run in arrays]
        terms = np.array([[row[name][index] if name in row else 0.0 for name, index in keys] for row in rows])
        rest = np.array([row["rest"][0] for row in rows])
        present = np.array([_get(values, name)[index] for name, index in keys])
        off = np.abs(terms @ present + rest - measured) / measured
        weights = counted / np.maximum(1.0, off / _NEAR) / measured
        found = nonnegative(terms * weights[:, None], (measured - rest) * weights)
        mixed = 0.5 * present + 0.5 * found
        if np.allclose(mixed, present, rtol=1e-3):
            break
        values = _set(values, dict(zip(keys, mixed, strict=True)))
    return values


def fit_level(runs: Sequence[Measured], start: Values, group: Mapping[str, str]) -> Values:
    """Returns `start` with the coefficients of all products multiplied by the factor that fits best."""
    measured = np.array([run.seconds for run in runs])

    def off(factor: float) -> float:
        return float(np.sum(np.abs(np.log(seconds(runs, _scaled(start, factor), group) / measured))))

    return _scaled(start, min(np.geomspace(0.5, 2.0, 141), key=off))


def _scaled(values: Values, factor: float) -> Values:
    return replace(values, products={name: vector * factor for name, vector in values.products.items()})


def seconds(runs: Sequence[Measured], values: Values, group: Mapping[str, str]) -> Vector:
    """Returns the times of the runs with these values."""
    everything = [*values.products, *_REST, "rest"]
    return np.array([_sum(_Run(run, group, values).linear(values), values, everything) for run in runs])


_REST = ("memory", "launch", "dispatch")
_Row = dict[str, Vector]
"""The derivatives of a time with respect to each value; "rest" has the part that depends on none."""


def _get(values: Values, name: str) -> Vector:
    other = {
        "memory": 1 / values.memory_fraction,
        "launch": values.launch_seconds,
        "dispatch": values.dispatch_seconds,
        "rest": 1.0,
    }
    return values.products[name] if name in values.products else np.array([other.get(name, 1.0)])


def _set(values: Values, found: Mapping[tuple[str, int], float]) -> Values:
    products = {name: vector.copy() for name, vector in values.products.items()}
    rest = {name: float(_get(values, name)[0]) for name in _REST}
    for (name, index), value in found.items():
        if name in products:
            products[name][index] = value
        else:
            rest[name] = value
    return Values(products, 1 / max(rest["memory"], 1.0), rest["launch"], rest["dispatch"])


def _sum(row: _Row, values: Values, names: Sequence[str]) -> float:
    return float(sum(row[name] @ _get(values, name) for name in names if name in row))


class _Run:
    """A run as arrays."""

    def __init__(self, run: Measured, group: Mapping[str, str], values: Values) -> None:
        self._rest = run.rest_seconds
        self._parts = [_Part(run.chip, part, group, values) for part in run.parts if part.operators]

    def linear(self, values: Values) -> _Row:
        total: _Row = {"rest": np.array([self._rest])}
        for part in self._parts:
            for name, vector in part.linear(values).items():
                total[name] = total.get(name, 0.0) + vector
        return total


class _Part:
    def __init__(self, chip: Chip, part: Part, group: Mapping[str, str], values: Values) -> None:
        operators = list(part.operators)
        self._times, self._starts = part.times, sum(part.operators.values()) + part.calls
        self._counts = np.array([part.operators[op] for op in operators], dtype=float)
        self._moved = np.array([moved_bytes(op) for op in operators]) / chip.memory_bytes_per_second
        self._terms = {name: np.zeros((len(operators), len(vector))) for name, vector in values.products.items()}
        for index, op in enumerate(operators):
            product = product_of(op) if op.flops else None
            if product is not None and (name := group.get(product.dtype)):
                self._terms[name][index] = _terms(chip, op, product)

    def linear(self, values: Values) -> _Row:
        computed = np.sum([terms @ values.products[name] for name, terms in self._terms.items()], axis=0)
        moved, launch = self._moved / values.memory_fraction, values.launch_seconds
        if self._counts @ np.maximum(np.maximum(computed, moved), launch) < self._starts * values.dispatch_seconds:
            return {"dispatch": np.array([self._starts * self._times])}
        by_products = (computed >= moved) & (computed >= launch)
        by_bytes = ~by_products & (moved >= launch)
        row = {name: (self._counts * by_products) @ terms * self._times for name, terms in self._terms.items()}
        row["memory"] = np.array([self._counts @ (self._moved * by_bytes) * self._times])
        row["launch"] = np.array([self._counts @ (~by_products & ~by_bytes) * self._times])
        return row


def _terms(chip: Chip, operator: Operator, product: Product) -> Vector:
    """Returns the terms of a product in seconds."""
    peak = chip.peak(product.dtype)
    swap = 0.0 if chip.cores is None else peak / chip.memory_bytes_per_second
    slower = FUSED_ATTENTION if is_attention(operator) else 1.0
    return operator.flops / peak / slower * terms_of(chip.cores, swap, product.count, product.m, product.n, product.k)

"""Fits the efficiencies of products on a chip to step times that were measured with it.

The time of an operator is the longest of three: the terms of a product (operator_cost.terms_of) times its FLOPs at the peak, its
bytes by the bandwidth that is reached, and a launch. The last two are those of the chip's file; only the coefficients of the terms
are sought. A section of a step takes the sum of its operators or, if that is longer, the time in which the host starts them: small
models are limited by it, and would otherwise be taken for slow products. So with the present values it is known which of these
counts, and a step time is a linear function of the values, beside what the replay adds: bubbles, communication. Values that fit
best are sought until none changes.
"""

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from bagualu.comm.calls import Communication
from bagualu.comm.topology import Chip
from bagualu.parallel.simulation.events import Event, Operator, Role
from bagualu.parallel.simulation.operator_cost import (
    FUSED_ATTENTION,
    Matrix,
    Product,
    Vector,
    is_attention,
    moved_bytes,
    nonnegative,
    product_of,
    terms_of,
)

ROUNDS = 60
_NEAR = 0.08
"""Rows that are further off count less: they measure something that no value of a chip explains."""


@dataclass(frozen=True)
class Values:
    """What is sought."""

    products: Mapping[str, Vector]
    """For each dtype, the coefficients of the terms of a product."""
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
    attention_slower: float = 1.0
    """How much longer its kernel of fused attention takes than the best for the chip."""


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


def fit(
    runs: Sequence[Measured], start: Values, group: Mapping[str, str], whole: Collection[str], levels: Collection[str] = ()
) -> Values:
    """Returns the values that fit the runs best. `group`: for each dtype of products, the name of its coefficients. Those named in
    `whole` are sought, those in `levels` keep their ratio while their level is sought, and others stay as they are."""
    arrays = [_Run(run, group, start) for run in runs]
    measured = np.array([run.seconds for run in runs])
    counted = np.array([run.weight for run in runs])
    bases = {name: np.eye(len(start.products[name])) for name in whole} | {name: start.products[name][:, None] for name in levels}
    if whole:  # from a level alone, the host's time cannot be told
        bases[_HOST] = np.eye(1)
    """The columns of each name's values of which a combination is sought."""
    values = start
    for _ in range(ROUNDS):
        rows = [run.linear(values) for run in arrays]
        terms = np.array(
            [np.concatenate([row.get(name, np.zeros(len(base))) @ base for name, base in bases.items()]) for row in rows]
        )
        rest = np.array([_sum({name: vector for name, vector in row.items() if name not in bases}, values) for row in rows])
        off = np.abs(np.array([_sum(row, values) for row in rows]) - measured) / measured
        weights = counted / np.maximum(1.0, off / _NEAR) / measured
        found = nonnegative(terms * weights[:, None], (measured - rest) * weights)
        after = _between(values, _with(values, bases, found))
        if all(np.allclose(_get(after, name), _get(values, name), rtol=1e-3) for name in bases):
            break
        values = after
    return values


def _with(values: Values, bases: Mapping[str, Matrix], found: Vector) -> Values:
    """Returns the values with these parts of the columns of `bases`."""
    sought, place = {}, 0
    for name, base in bases.items():
        sought[name] = base @ found[place : place + base.shape[1]]
        place += base.shape[1]
    host = sought.pop(_HOST, None)
    return Values({**values.products, **sought}, values.dispatch_seconds if host is None else float(host[0]))


def _between(left: Values, right: Values) -> Values:
    products = {name: (vector + right.products[name]) / 2 for name, vector in left.products.items()}
    return Values(products, (left.dispatch_seconds + right.dispatch_seconds) / 2)


def seconds(runs: Sequence[Measured], values: Values, group: Mapping[str, str]) -> Vector:
    """Returns the times of the runs with these values."""
    return np.array([_sum(_Run(run, group, values).linear(values), values) for run in runs])


_HOST, _REST = "host", "rest"
_Row = dict[str, Vector]
"""The derivatives of a time with respect to each value; "rest" has the part that depends on none."""


def _get(values: Values, name: str) -> Vector:
    return values.products[name] if name in values.products else np.array([values.dispatch_seconds])


def _sum(row: _Row, values: Values) -> float:
    return float(row[_REST][0] + sum(vector @ _get(values, name) for name, vector in row.items() if name != _REST))


class _Run:
    """A run as arrays."""

    def __init__(self, run: Measured, group: Mapping[str, str], values: Values) -> None:
        self._rest = run.rest_seconds
        self._parts = [_Part(run, part, group, values) for part in run.parts if part.operators]

    def linear(self, values: Values) -> _Row:
        total: _Row = {_REST: np.array([self._rest])}
        for part in self._parts:
            for name, vector in part.linear(values).items():
                total[name] = total.get(name, 0.0) + vector
        return total


class _Part:
    def __init__(self, run: Measured, part: Part, group: Mapping[str, str], values: Values) -> None:
        chip, slower = run.chip, FUSED_ATTENTION / run.attention_slower
        operators = list(part.operators)
        self._times, self._starts = part.times, sum(part.operators.values()) + part.calls
        self._counts = np.array([part.operators[op] for op in operators], dtype=float)
        bandwidth = chip.memory_bytes_per_second * chip.memory_fraction
        self._least = np.maximum([moved_bytes(op) / bandwidth for op in operators], chip.launch_seconds)
        self._terms = {name: np.zeros((len(operators), len(vector))) for name, vector in values.products.items()}
        for index, op in enumerate(operators):
            product = product_of(op) if op.flops else None
            if product is not None and (name := group.get(product.dtype)):
                self._terms[name][index] = _terms(chip, op, product) / (slower if is_attention(op) else 1.0)

    def linear(self, values: Values) -> _Row:
        computed = np.sum([terms @ values.products[name] for name, terms in self._terms.items()], axis=0)
        if self._counts @ np.maximum(computed, self._least) < self._starts * values.dispatch_seconds:
            return {_HOST: np.array([self._starts * self._times])}
        by_products = computed >= self._least
        row = {name: (self._counts * by_products) @ terms * self._times for name, terms in self._terms.items()}
        return {**row, _REST: np.array([(self._counts * ~by_products) @ self._least * self._times])}


def _terms(chip: Chip, operator: Operator, product: Product) -> Vector:
    """Returns the terms of a product in seconds."""
    peak = chip.peak(product.dtype)
    swap = 0.0 if chip.cores is None else peak / chip.memory_bytes_per_second
    return operator.flops / peak * terms_of(chip.cores, swap, product.count, product.m, product.n, product.k)

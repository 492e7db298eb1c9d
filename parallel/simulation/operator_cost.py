"""Seconds of an operator on a described chip: a roofline, of whose peak a matrix product reaches a part that depends on its shape.

A kernel takes the longest of three times: its floating-point operations by the chip's matmul peak, its bytes by the bandwidth of
the chip's memory, and the fixed time of a launch.

On a CPU the launch comes in addition to the kernel, and where times of an operator were measured on the chip (measured_times.py),
these count instead.

The part of the peak that a product [m, k] x [k, n] reaches. A chip divides the m n results into tiles, computes as many tiles at a
time as it has cores, and goes through k once for each of them. So its time is about

    a mnk + b mn + c k + d        (in units of the time at the peak)

a: the rate with all cores busy. b: the start and the end of each tile, when nothing is multiplied. c: cores that are idle because
there are fewer tiles than cores, or in the last round of tiles. d: a fixed time. The coefficients are those that fit the chip's
table of measured efficiencies best; what they leave over at each entry of the table is interpolated between entries, in proportion.
So a few entries do, and an entry itself is met exactly.

Shapes: B batch, A heads, Q queries, K keys, D width of a head, E experts.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import combinations
from math import exp, inf, log, log2, prod
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from bagualu.comm.topology import Chip, ShapeEfficiency
from bagualu.parallel.simulation.events import Operator, TensorType
from bagualu.parallel.simulation.measured_times import measured_seconds

Matrix: TypeAlias = npt.NDArray[np.float64]
Vector: TypeAlias = npt.NDArray[np.float64]

ALIGNED_BYTES = 16
"""An NVIDIA chip's matrix units take rows of a multiple of this; others go through its vector units, at the float32 peak.
https://docs.nvidia.com/deeplearning/performance/dl-performance-matrix-multiplication/ (requirements of Tensor Cores)"""
_UNMEASURED = (
    ShapeEfficiency(8192, 8192, 8192, 0.75),
    ShapeEfficiency(512, 512, 8192, 0.25),
    ShapeEfficiency(8192, 8192, 256, 0.5),
)
"""The table of a chip without one: an estimate."""
_HALF = ("bfloat16", "float16")
_ATTENTION = ("_flash_attention", "_efficient_attention", "_cudnn_attention", "_fused_attention")
_GATHERS = ("aten.embedding.", "aten.index_select.", "aten.gather.", "aten.index.")
"""Operators that read only as much of their first tensor as they write."""


@dataclass(frozen=True)
class Product:
    """`count` products [m, k] x [k, n] in one kernel."""

    count: int
    m: int
    n: int
    k: int
    dtype: str


def operator_seconds(chip: Chip, operator: Operator) -> float:
    """Returns the seconds of `operator` on `chip`. Raises RecipeError if the chip has no peak for the dtype of its products."""
    if (measured := measured_seconds(chip, operator)) is not None:
        return chip.launch_seconds + measured
    computed = 0.0
    if operator.flops:
        product = product_of(operator)
        computed = operator.flops / rate(chip, product) if product else operator.flops / chip.peak(_dtype(operator.inputs[0]))
    kernel = max(computed, moved_bytes(operator) / chip.memory_bytes_per_second)
    # A CPU itself computes what an operator is, and so begins it only when the one before has ended.
    return chip.launch_seconds + kernel if chip.type == "cpu" else max(chip.launch_seconds, kernel)


def moved_bytes(operator: Operator) -> int:
    """Returns the bytes that an operator moves between the chip and its memory."""
    if operator.name.startswith(_GATHERS):
        return 2 * operator.written_bytes
    return operator.read_bytes + operator.written_bytes


def rate(chip: Chip, product: Product) -> float:
    """Returns the floating-point operations per second of a product. Raises RecipeError if the chip has no peak for its dtype."""
    reached = efficiency(_table(chip, product.dtype), product.count * product.m, product.n, product.k)
    return chip.peak(product.dtype if _aligned(chip, product) else "float32") * reached


def product_of(operator: Operator) -> Product | None:
    """Returns the product that an operator computes; of attention, a product of its size for each head. None if it is of a kind
    that is not known."""
    tensors = [tensor for tensor in operator.inputs if len(tensor.shape) >= 2]
    kind = operator.name.removeprefix("aten.").split(".")[0]
    if any(name in kind for name in _ATTENTION):
        query, key = _queries(kind, tensors)
        return Product(prod(query.shape[:-2]), query.shape[-2], max(1, key.shape[-2] // 2), query.shape[-1], _dtype(query))
    if "addmm" in kind or "baddbmm" in kind:
        tensors = tensors[-2:]
    if len(tensors) < 2:
        return None
    left, right = tensors[0], tensors[1]
    if "grouped_mm" in kind:
        return _grouped(left, right)
    count = left.shape[0] if len(left.shape) == 3 else 1
    return Product(count, left.shape[-2], right.shape[-1], left.shape[-1], _dtype(left))


def _queries(kind: str, tensors: Sequence[TensorType]) -> tuple[TensorType, TensorType]:
    """Returns query and key of attention; its backward pass has the gradient of the output before them."""
    four = [tensor for tensor in tensors if len(tensor.shape) == 4]
    return (four[1], four[2]) if "backward" in kind else (four[0], four[1])


def _grouped(left: TensorType, right: TensorType) -> Product:
    """Rows [N, I] of E experts by weights [E, I, O]; or [I, N] by [N, O], of which each expert has its part of the N."""
    if len(right.shape) == 3:
        experts = right.shape[0]
        return Product(experts, max(1, left.shape[0] // experts), right.shape[-1], left.shape[-1], _dtype(left))
    return Product(1, left.shape[-2], right.shape[-1], left.shape[-1], _dtype(left))


def _dtype(tensor: TensorType) -> str:
    return "float8" if tensor.dtype.startswith("float8") else tensor.dtype


def _aligned(chip: Chip, product: Product) -> bool:
    elements = ALIGNED_BYTES // {"float8": 1, "bfloat16": 2, "float16": 2, "float32": 4}.get(product.dtype, ALIGNED_BYTES)
    return chip.vendor != "NVIDIA" or product.n % elements == product.k % elements == 0


def _table(chip: Chip, dtype: str) -> tuple[ShapeEfficiency, ...]:
    """Returns the chip's table for `dtype`; in its place, that for the other dtype of 16 bits, or any."""
    tables = chip.efficiency
    for name in (dtype, *(_HALF if dtype in (*_HALF, "float8") else ()), *tables):
        if found := tables.get(name):
            return tuple(found)
    return _UNMEASURED


def efficiency(table: tuple[ShapeEfficiency, ...], m: int, n: int, k: int) -> float:
    """Returns the part of the peak, above 0 and at most 1, of a product [m, k] x [k, n] by a table of measured ones."""
    return _form(table)(m * n, k)


class _Form:
    """1 / fraction = a + b / k + c / mn + d / mnk, and what this leaves over at the entries of the table."""

    def __init__(self, table: Sequence[ShapeEfficiency]) -> None:
        terms = np.array([_terms(entry.m * entry.n, entry.k) for entry in table])
        wanted = np.array([1 / entry.fraction for entry in table])
        self._coefficients = nonnegative(terms / wanted[:, None], np.ones(len(table)))
        self._places = [(log2(entry.m * entry.n) / 2, log2(entry.k)) for entry in table]
        self._left = [log(value) for value in wanted / (terms @ self._coefficients)]

    def __call__(self, area: int, k: int) -> float:
        inverse = float(_terms(area, k) @ self._coefficients)
        x, y = log2(area) / 2, log2(k)
        weights = [1 / ((x - u) ** 2 + (y - v) ** 2 + 1e-12) ** 2 for u, v in self._places]
        left = sum(weight * value for weight, value in zip(weights, self._left, strict=True)) / sum(weights)
        return min(1.0, 1 / (inverse * exp(left)))


def _terms(area: int, k: int) -> Vector:
    return np.array([1.0, 1 / k, 1 / area, 1 / (area * k)])


@lru_cache(64)
def _form(table: tuple[ShapeEfficiency, ...]) -> _Form:
    return _Form(table)


def nonnegative(terms: Matrix, wanted: Vector) -> Vector:
    """Returns the coefficients x >= 0, not all 0, with the least |terms x - wanted|: of all choices of terms that may be above 0,
    the best. `terms` [N, C] with few columns."""
    best, least = None, inf
    columns = range(terms.shape[1])
    for size in range(1, terms.shape[1] + 1):
        for chosen in combinations(columns, size):
            found = np.linalg.lstsq(terms[:, chosen], wanted, rcond=None)[0]
            error = float(np.sum((terms[:, chosen] @ found - wanted) ** 2))
            if (found >= 0).all() and found.any() and error < least:
                best, least = np.zeros(terms.shape[1]), error
                best[list(chosen)] = found
    assert best is not None, "the first term alone always has a coefficient above 0"
    return best

"""Seconds of an operator on a described chip: a roofline, of whose peak a matrix product reaches a part that depends on its shape.

A kernel takes the longest of three times: its floating-point operations by the chip's matmul peak, its bytes by the bandwidth of
the chip's memory, and the fixed time of a launch.

On a CPU the launch comes in addition to the kernel, and where times of an operator were measured on the chip (measured_times.py),
these count instead.

The part of the peak that a product [m, k] x [k, n] reaches. A chip divides the m n results into tiles, and computes as many tiles
at a time as it has cores; in the last round of tiles some cores are idle. At the start and at the end of each tile nothing is
multiplied. So for the library's best size of tiles, which are T and fill R rounds, the time is about

    (a + b / k) R cores tile / mn     in units of the time at the peak

(NVIDIA, Matrix Multiplication Background, "Tile Quantization" and "Wave Quantization"). Where there are few tiles and k is large,
several cores share a tile. If the number of cores is not known, the time is about a + b / k + c / mn + d / mnk. The coefficients
are those that fit the chip's table of measured efficiencies best; what they leave over at each entry is interpolated between
entries. So a few entries do, and an entry itself is met exactly. No product is faster than the fastest of the table, because what
limits large products is the power that a chip may draw, and not their shape.

Shapes: B batch, A heads, Q queries, K keys, D width of a head, E experts.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from itertools import combinations
from math import ceil, exp, inf, log, log2, prod
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from bagualu.comm.topology import Chip, ShapeEfficiency
from bagualu.parallel.simulation.events import Operator, TensorType
from bagualu.parallel.simulation.measured_times import measured_seconds

Matrix: TypeAlias = npt.NDArray[np.float64]
Vector: TypeAlias = npt.NDArray[np.float64]

ALIGNED_BYTES = 16
"""A kernel for many products at a time on an NVIDIA chip needs rows of a multiple of this for its matrix units. Others go through
the vector units, at the float32 peak: https://docs.nvidia.com/deeplearning/performance/dl-performance-matrix-multiplication/"""
TILES = ((256, 128, 1.0), (128, 256, 1.0), (128, 128, 0.91), (128, 64, 0.83), (64, 128, 0.83), (64, 64, 0.77))
"""Rows and columns of the tiles that libraries have, from the most efficient, and their speed."""
PARTS = (1, 2, 4, 8)
LEAST_DEPTH = 1024
"""The k of a tile is divided among cores only into parts of at least this many elements."""
TYPICAL_START = 64
"""For the choice of a tile: its start and end take as long as this many elements of k."""
FUSED_ATTENTION = 0.75
"""The speed of fused attention as a part of that of a product with its tiles: the softmax stands between its two products. With it
an A100, whose largest products reach 0.81 of the peak, reaches 0.6 in attention; FlashAttention-2, forward and backward, causal,
heads of 128 elements, reaches 0.55 to 0.6 there (arXiv 2307.08691, section 4.1)."""
_UNMEASURED = (
    ShapeEfficiency(8192, 8192, 8192, 0.75),
    ShapeEfficiency(512, 512, 8192, 0.25),
    ShapeEfficiency(8192, 8192, 256, 0.62),
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
        speed = rate(chip, product, is_attention(operator)) if product else chip.peak(_dtype(operator.inputs[0]))
        computed = operator.flops / (speed * FUSED_ATTENTION if is_attention(operator) else speed)
    kernel = max(computed, moved_bytes(operator) / (chip.memory_bytes_per_second * chip.memory_fraction))
    # A CPU itself computes what an operator is, and so begins it only when the one before has ended.
    return chip.launch_seconds + kernel if chip.type == "cpu" else max(chip.launch_seconds, kernel)


def moved_bytes(operator: Operator) -> int:
    """Returns the bytes that an operator moves between the chip and its memory."""
    if operator.name.startswith(_GATHERS):
        return 2 * operator.written_bytes
    return operator.read_bytes + operator.written_bytes


def rate(chip: Chip, product: Product, padded: bool = False) -> float:
    """Returns the floating-point operations per second of a product. `padded`: whether its kernel pads rows that the chip's matrix
    units do not take, as kernels of fused attention do. Raises RecipeError if the chip has no peak for its dtype."""
    return chip.peak(product.dtype if padded or _aligned(chip, product) else "float32") * efficiency(chip, product)


def product_of(operator: Operator) -> Product | None:
    """Returns the product that an operator computes; None if it is of a kind that is not known.

    For each tile of queries, a kernel of fused attention goes over the keys that the mask leaves, half of them: its tiles are those
    of a product [Q, K / 2] x [K / 2, D] for each head."""
    tensors = [tensor for tensor in operator.inputs if len(tensor.shape) >= 2]
    kind = operator.name.removeprefix("aten.").split(".")[0]
    if is_attention(operator):
        query, key = _queries(kind, tensors)
        return Product(prod(query.shape[:-2]), query.shape[-2], query.shape[-1], max(1, key.shape[-2] // 2), _dtype(query))
    if "addmm" in kind or "baddbmm" in kind:
        tensors = tensors[-2:]
    if len(tensors) < 2:
        return None
    left, right = tensors[0], tensors[1]
    if "grouped_mm" in kind:
        return _grouped(left, right)
    count = left.shape[0] if len(left.shape) == 3 else 1
    return Product(count, left.shape[-2], right.shape[-1], left.shape[-1], _dtype(left))


def is_attention(operator: Operator) -> bool:
    """Returns whether an operator is a kernel of fused attention."""
    return any(name in operator.name for name in _ATTENTION)


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
    return chip.vendor != "NVIDIA" or product.count == 1 or product.n % elements == product.k % elements == 0


def _table(chip: Chip, dtype: str) -> tuple[ShapeEfficiency, ...]:
    """Returns the chip's table for `dtype`; in its place, that for the other dtype of 16 bits, or any."""
    tables = chip.efficiency
    for name in (dtype, *(_HALF if dtype in (*_HALF, "float8") else ()), *tables):
        if found := tables.get(name):
            return tuple(found)
    return _UNMEASURED


def efficiency(chip: Chip, product: Product) -> float:
    """Returns the part of the peak, above 0 and at most 1, that a product reaches."""
    swap = 0.0 if chip.cores is None else chip.peak(product.dtype) / chip.memory_bytes_per_second
    return _form(_table(chip, product.dtype), chip.cores, swap)(product)


class _Form:
    """The form of the efficiencies of a chip, and what it leaves over at the entries of the table."""

    def __init__(self, table: Sequence[ShapeEfficiency], cores: int | None, swap: float) -> None:
        """`swap`: floating-point operations in the time in which a byte of memory is moved."""
        self._terms = lru_cache(4096)(partial(terms_of, cores, swap))
        products = [Product(1, entry.m, entry.n, entry.k, "") for entry in table]
        terms = np.array([self._terms(product.count, product.m, product.n, product.k) for product in products])
        wanted = np.array([1 / entry.fraction for entry in table])
        self._coefficients = nonnegative(terms / wanted[:, None], np.ones(len(table)))
        self._places = [_place(product) for product in products]
        self._left = [log(value) for value in wanted / (terms @ self._coefficients)]
        self._most = max(entry.fraction for entry in table)

    def __call__(self, product: Product) -> float:
        inverse = float(self._terms(product.count, product.m, product.n, product.k) @ self._coefficients)
        x, y = _place(product)
        weights = [1 / ((x - u) ** 2 + (y - v) ** 2 + 1e-12) ** 2 for u, v in self._places]
        left = sum(weight * value for weight, value in zip(weights, self._left, strict=True)) / sum(weights)
        return min(self._most, 1 / (inverse * exp(left)))


def _place(product: Product) -> tuple[float, float]:
    """Returns where a product lies between the entries of a table: the logarithms of the side of its result and of k."""
    return log2(product.count * product.m * product.n) / 2, log2(product.k)


def terms_of(cores: int | None, swap: float, count: int, m: int, n: int, k: int) -> Vector:
    """Returns the terms of 1 / fraction, each with a coefficient of its own."""
    area = count * m * n
    if cores is None:
        return np.array([1.0, 1 / k, 1 / area, 1 / (area * k)])
    times = [
        _tiled(cores, swap, count, m, n, k, tile, parts)
        for tile in TILES
        for parts in PARTS
        if parts == 1 or k >= parts * LEAST_DEPTH
    ]
    return np.array(min(times, key=lambda time: time[0] + time[1] * TYPICAL_START))


def _tiled(
    cores: int, swap: float, count: int, m: int, n: int, k: int, tile: tuple[int, int, float], parts: int
) -> tuple[float, float]:
    """Returns what a product takes with tiles of a size, in units of the time at the peak: while multiplying, and for each element
    of k that the start and end of a tile take as long as. With `parts`, as many cores share a tile, each with a part of k, and
    their results are written in float32 and added."""
    rows, columns, speed = tile
    tiles = count * ceil(m / rows) * ceil(n / columns) * parts
    computed = ceil(tiles / cores) * cores * rows * columns / (count * m * n * parts * speed)
    added = 0.0 if parts == 1 else (parts + 1) * 4 * swap / (2 * k)
    return computed + added, computed * parts / k


@lru_cache(64)
def _form(table: tuple[ShapeEfficiency, ...], cores: int | None, swap: float) -> _Form:
    return _Form(table, cores, swap)


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

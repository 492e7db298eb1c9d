"""Seconds of an operator from the times that were measured of it for other sizes (`Chip.operators`)."""

from bisect import bisect_left
from collections.abc import Sequence
from functools import lru_cache
from math import exp, log

from bagualu.comm.topology import Chip, OperatorTime
from bagualu.parallel.simulation.events import Operator


def work_of(operator: Operator) -> float:
    """Returns on what the time of an operator depends: the floating-point operations of products, the bytes that others read and
    write."""
    return float(operator.flops or operator.read_bytes + operator.written_bytes)


def dtype_of(operator: Operator) -> str:
    """Returns the dtype of the first tensor of an operator, "" if it has none."""
    tensors = operator.inputs or operator.outputs
    return tensors[0].dtype if tensors else ""


def measured_seconds(chip: Chip, operator: Operator) -> float | None:
    """Returns the seconds of `operator` by the times measured of it on `chip`; None if there are none.

    Of other dtypes if there are none of its own. Between two measured sizes the logarithms of time and work are interpolated;
    outside, a smaller one takes as long as the smallest, a larger one takes more in proportion.
    """
    measured = chip.operators.get(operator.name)
    if not measured:
        return None
    works, seconds = _points(measured, dtype_of(operator))
    work = max(1.0, work_of(operator))
    after = bisect_left(works, work)
    if after == 0:
        return seconds[0]
    if after == len(works):
        return seconds[-1] * work / works[-1]
    part = log(work / works[after - 1]) / log(works[after] / works[after - 1])
    return exp((1 - part) * log(seconds[after - 1]) + part * log(seconds[after]))


@lru_cache(1024)
def _points(measured: Sequence[OperatorTime], dtype: str) -> tuple[list[float], list[float]]:
    """Returns the works and the seconds of the rows of a dtype, or of all rows if it has none, by ascending work."""
    rows = [row for row in measured if row.dtype == dtype] or list(measured)
    by_work = {row.work: row.seconds for row in rows}
    return sorted(by_work), [by_work[work] for work in sorted(by_work)]

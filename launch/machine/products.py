"""Times matrix products, copies and the launch of operators on the device of a rank."""

import time
from collections.abc import Callable, Iterable
from itertools import chain
from statistics import median

import torch

from bagualu.launch.machine.figures import ProductTime, usual
from bagualu.launch.machine.plan import TRAINED, MeasuringPlan
from bagualu.trainer.costs.throughput import synchronize

_CACHES_BYTES = 2**26
"""Operands take turns until together they are larger than this, so that a product finds no more of them in the caches than in a
step of training."""
_MOST_SETS = 16
_LAUNCHES = 1000
_TOGETHER = 8

Meet = Callable[[], None]
"""Waits for the other ranks, so that all measure the same thing at the same time."""


def works(dtype: torch.dtype, device: torch.device) -> bool:
    """Returns whether the device multiplies matrices of `dtype`."""
    try:
        torch.mm(torch.ones(2, 2, dtype=dtype, device=device), torch.ones(2, 2, dtype=dtype, device=device))
    except (RuntimeError, TypeError, NotImplementedError):  # torch raises each of them for a kernel that is missing
        return False
    return True


@torch.no_grad()
def product_times(dtypes: Iterable[str], device: torch.device, plan: MeasuringPlan, meet: Meet) -> tuple[list[ProductTime], float]:
    """Returns the times of the products of `plan`, and by which fraction a time differed between rounds, in the median."""
    grid = plan.cpu if device.type == "cpu" else plan.gpu
    wanted = [
        (name, shape)
        for name in dtypes
        for shape in dict.fromkeys((grid if name in TRAINED else plan.few).shapes())
        if works(getattr(torch, name), device)
    ]
    sizes: dict[str, int] = {}
    for name, (m, n, k) in wanted:
        sizes[name] = max(sizes.get(name, 0), m * k + n * k + m * n)
    pools = {name: _pool(size, getattr(torch, name), device) for name, size in sizes.items()}
    rounds: list[list[list[float]]] = []
    for _ in range(plan.rounds):
        meet()
        rounds.append([_product_calls(shape, *pools[name], plan.product_seconds) for name, shape in wanted])
    times = [
        ProductTime(name, m, n, k, usual(chain(*calls)))
        for (name, (m, n, k)), calls in zip(wanted, zip(*rounds, strict=True), strict=True)
    ]
    apart = [max(map(usual, calls)) / min(map(usual, calls)) - 1 for calls in zip(*rounds, strict=True)]
    return times, median(apart or [0.0])


def _pool(least: int, dtype: torch.dtype, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns operands and room for results: `least` numbers each, or more if that is less than the caches hold. Operands are
    random: an accelerator multiplies constants faster, because they take less power."""
    operands = torch.rand(max(least, _CACHES_BYTES // dtype.itemsize), device=device).to(dtype)
    return operands, torch.empty_like(operands)


def _product_calls(shape: tuple[int, int, int], operands: torch.Tensor, results: torch.Tensor, least: float) -> list[float]:
    """Returns the times of a linear layer's product: rows [m, k] by the transpose of a weight [n, k]."""
    m, n, k = shape
    size = m * k + n * k + m * n
    sets = max(1, min(_MOST_SETS, _CACHES_BYTES // (size * operands.itemsize)))

    def call(index: int) -> None:
        first = index % sets * size
        rows, weight = operands[first : first + m * k], operands[first + m * k : first + (m + n) * k]
        torch.mm(rows.view(m, k), weight.view(n, k).T, out=results[first : first + m * n].view(m, n))

    return calls_seconds(call, operands.device, least)


def calls_seconds(call: Callable[[int], None], device: torch.device, least: float) -> list[float]:
    """Returns the times of `call(index)`, repeated for `least` seconds or more, after one that does not count. On an accelerator,
    which runs ahead, each is the mean of several in a row."""
    together = 1 if device.type == "cpu" else _TOGETHER
    call(0)
    synchronize(device)
    seconds: list[float] = []
    while not seconds or sum(seconds) * together < least:
        started = time.perf_counter()
        for index in range(together):
            call(len(seconds) * together + index + 1)
        synchronize(device)
        seconds.append((time.perf_counter() - started) / together)
    return seconds


def copy_bytes_per_second(device: torch.device, plan: MeasuringPlan, meet: Meet) -> float:
    """Returns the bytes per second that are read and written by a copy within the device's memory."""
    source = torch.ones(plan.copied_bytes, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    seconds: list[float] = []

    def copy(_: int) -> None:
        target.copy_(source)

    for _ in range(plan.rounds):
        meet()
        seconds += calls_seconds(copy, device, 10 * plan.product_seconds)
    return 2 * plan.copied_bytes / usual(seconds)


def launch_seconds(device: torch.device, rounds: int) -> float:
    """Returns the time of an operator on a single number, of many in a row."""
    number = torch.zeros(1, device=device)
    seconds = []
    for _ in range(rounds):
        synchronize(device)
        started = time.perf_counter()
        for _ in range(_LAUNCHES):
            number.add_(1)
        synchronize(device)
        seconds.append((time.perf_counter() - started) / _LAUNCHES)
    return usual(seconds)

"""Times the communication between the ranks of this machine."""

import time
from collections.abc import Callable

import torch

from bagualu.comm.group import Group
from bagualu.launch.machine.figures import LinkTime, usual
from bagualu.launch.machine.plan import MeasuringPlan
from bagualu.trainer.costs.throughput import synchronize

_MOST_REPEATS = 200


def link_times(group: Group, plan: MeasuringPlan) -> list[LinkTime]:
    """Returns the time of each kind of communication in `group` for each size. Collective.

    Sizes are those of comm/cost.py: of the whole buffer, which is the output of an all_gather and the input of the others.
    """
    found = []
    for size in plan.message_bytes:
        for kind, call in _calls(group, size).items():
            seconds = _seconds(call, group, plan.message_seconds)
            found.append(LinkTime(kind, size, group.size, seconds / 2 if kind == "p2p" else seconds))  # there and back
    return found


def _calls(group: Group, size: int) -> dict[str, Callable[[], None]]:
    """Returns, by kind, what a rank does for a communication of `size` bytes: each as the trainer does it. Gradients are summed in
    memory that ranks lend each other, where that is possible."""
    count = size // 4 // group.size * group.size
    whole, other, part = (torch.zeros(numbers, device=group.device) for numbers in (count, count, count // group.size))
    lent = group.lend(count, torch.float32)
    gradients = whole if lent is None else lent

    def message() -> None:
        if group.rank < 2:
            arriving = group.receive(other, 1 - group.rank, asynchronous=True)
            if group.rank == 1:
                arriving.wait()
            sent = group.send(whole, 1 - group.rank, asynchronous=True)
            if group.rank == 0:
                arriving.wait()
            sent.wait()

    return {
        "all_reduce": lambda: group.all_reduce(whole).wait(),
        "all_gather": lambda: group.all_gather(whole, part, asynchronous=True).wait(),
        "reduce_scatter": lambda: group.reduce_scatter(part, gradients, asynchronous=True).wait(),
        "all_to_all": lambda: group.all_to_all(other, whole).wait(),
        "broadcast": lambda: group.broadcast(whole).wait(),
        "p2p": message,
    }


def _seconds(call: Callable[[], None], group: Group, least: float) -> float:
    """Returns the usual time of `call`, repeated as often as all ranks agree on."""
    call()
    repeats = _repeats(call, group, least)
    group.barrier()
    seconds = []
    for _ in range(repeats):
        synchronize(group.device)
        started = time.perf_counter()
        call()
        synchronize(group.device)
        seconds.append(time.perf_counter() - started)
    return usual(seconds)


def _repeats(call: Callable[[], None], group: Group, least: float) -> int:
    """Returns how often `call` must be repeated to take `least` seconds, the same on every rank."""
    group.barrier()
    started = time.perf_counter()
    call()
    synchronize(group.device)
    wanted = torch.tensor([least / max(1e-6, time.perf_counter() - started)], dtype=torch.float64, device=group.device)
    group.all_reduce(wanted, op="max")
    return max(2, min(_MOST_REPEATS, int(wanted)))

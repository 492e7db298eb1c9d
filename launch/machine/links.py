"""Times the communication between the ranks of this machine."""

import time
from collections.abc import Callable

import torch

from bagualu.comm.group import Group
from bagualu.launch.machine.figures import LinkTime, usual
from bagualu.launch.machine.plan import MeasuringPlan
from bagualu.trainer.costs.throughput import synchronize

_FEWEST_REPEATS = 2
"""After so many repeats, and whenever there are twice as many, ranks agree whether these are enough. They do not settle the number
by the time of one call: on a busy machine a call that happened to be quick would ask for hundreds that are not."""
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
        "all_to_all": lambda: group.all_to_all(other.view(group.size, -1), whole.view(group.size, -1)).wait(),
        "broadcast": lambda: group.broadcast(whole).wait(),
        "p2p": message,
    }


def _seconds(call: Callable[[], None], group: Group, least: float) -> float:
    """Returns the usual time of `call`, repeated until it has taken `least` seconds on one of the ranks."""
    call()
    seconds: list[float] = []
    group.barrier()
    while len(seconds) < _MOST_REPEATS and (not seconds or _most(sum(seconds), group) < least):
        more = min(max(_FEWEST_REPEATS, len(seconds)), _MOST_REPEATS - len(seconds))
        seconds += [_once(call, group) for _ in range(more)]
    return usual(seconds)


def _once(call: Callable[[], None], group: Group) -> float:
    synchronize(group.device)
    started = time.perf_counter()
    call()
    synchronize(group.device)
    return time.perf_counter() - started


def _most(seconds: float, group: Group) -> float:
    """Returns the most of what the ranks give, the same on all of them. Collective."""
    most = torch.tensor([seconds], dtype=torch.float64, device=group.device)
    group.all_reduce(most, op="max")
    return float(most)

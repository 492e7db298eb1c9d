"""What members on one machine exchange through memory is what they would have exchanged over the network, and nothing is left."""

import gc
import os
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from bagualu.comm import gloo, shared_memory
from bagualu.comm.backend import Work
from bagualu.comm.errors import CommunicationError
from bagualu.comm.gloo import GlooTransport
from bagualu.comm.group import Communicator
from tests.comm import test_conformance as conformance
from tests.harness import WorkerFailed, run


def slots_of(c: Communicator) -> shared_memory.Slots | None:
    assert isinstance(c.world.transport, GlooTransport)
    return c.world.transport.slots


def all_sizes(c: Communicator, function: Callable[..., None], *args: object) -> None:
    """`function` with even the smallest contents in memory."""
    usual, gloo.LEAST_SHARED_BYTES = gloo.LEAST_SHARED_BYTES, 1
    try:
        function(c, *args)
        assert slots_of(c) is not None
    finally:
        gloo.LEAST_SHARED_BYTES = usual


@pytest.mark.parametrize("size", conformance.SIZES)
class TestConformance:
    @pytest.mark.parametrize("dtype", conformance.DTYPES, ids=str)
    def test_collectives(self, size: int, dtype: torch.dtype) -> None:
        run("gloo", size, all_sizes, conformance.collectives, dtype)

    def test_in_place(self, size: int) -> None:
        run("gloo", size, all_sizes, conformance.in_place)

    def test_waiting_again(self, size: int) -> None:
        run("gloo", size, all_sizes, conformance.waiting_again)


def test_reduce_scatter_rounds_once() -> None:
    run("gloo", 4, all_sizes, conformance.sums_are_rounded_once)


def subgroups(c: Communicator) -> None:
    conformance.subgroups(c)
    assert slots_of(c) is None  # only the groups that exchange something have memory


def test_subgroups() -> None:
    run("gloo", 4, _with_memory_for_all_sizes, subgroups)


def _with_memory_for_all_sizes(c: Communicator, function: Callable[[Communicator], None]) -> None:
    usual, gloo.LEAST_SHARED_BYTES = gloo.LEAST_SHARED_BYTES, 1
    try:
        function(c)
    finally:
        gloo.LEAST_SHARED_BYTES = usual


def exchanges(c: Communicator, through_memory: bool) -> list[torch.Tensor]:
    """Many at once, in more sizes than fit, waited for in an order of each member's own and with delays of its own."""
    assert isinstance(c.world.transport, GlooTransport)
    c.world.transport.on_one_machine = through_memory
    values, own = torch.Generator().manual_seed(c.rank), torch.Generator().manual_seed(c.rank + 100)
    drawn = torch.Generator().manual_seed(7)  # the same on every member
    results, works = [], list[Work]()
    for number in range(40):
        kind, elements = (int(torch.randint(3, (), generator=drawn)), 2 ** int(torch.randint(12, 22, (), generator=drawn)))
        dtype = (torch.float32, torch.bfloat16)[number % 2]
        x = torch.randn(elements, generator=values).to(dtype)
        if kind == 0:
            results.append(x)
            works.append(c.world.all_reduce(x, asynchronous=True))
        elif kind == 1:
            results.append(x.new_empty(c.size * elements))
            works.append(c.world.all_gather(results[-1], x, asynchronous=True))
        else:
            results.append(x.new_empty(elements // c.size))
            works.append(c.world.reduce_scatter(results[-1], x, asynchronous=True))
        while len(works) > int(torch.randint(8, (), generator=own)):
            works.pop(int(torch.randint(len(works), (), generator=own))).wait()
        if torch.randint(4, (), generator=own) == 0:
            time.sleep(0.002)
    for work in works:
        work.wait()
    assert (slots_of(c) is not None) == through_memory
    return [result.double().sum(dtype=torch.float64) if result.numel() > 2**16 else result for result in results]


@pytest.mark.parametrize("size", [2, 4])
def test_the_same_bits_as_over_the_network(size: int) -> None:
    through_memory, over_network = run("gloo", size, exchanges, True), run("gloo", size, exchanges, False)
    for here, there in zip(through_memory, over_network, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(here, there, strict=True))


def unalike_waits(c: Communicator) -> None:
    # Member 0 goes on as far as it can while member 1 has not waited for anything; what 1 then reads is what it was given.
    n, tensors = 9, [torch.full((2**17,), float(10 * i + c.rank)) for i in range(9)]
    works = []
    for i in range(n):
        works.append(c.world.all_reduce(tensors[i], asynchronous=True))
        if c.rank == 0:
            works[-1].wait()
            tensors[i] = tensors[i].clone()
    time.sleep(0.05 * c.rank)
    for work in works:
        work.wait()
    for i, tensor in enumerate(tensors):
        conformance.expect(tensor, torch.full_like(tensor, 20.0 * i + 1))


def test_a_slow_reader_finds_what_it_was_given() -> None:
    run("gloo", 2, unalike_waits)


def without(c: Communicator, broken: str) -> None:
    """Member 1 cannot make or see memory."""
    usual = getattr(shared_memory, broken)
    if c.rank == 1:
        setattr(shared_memory, broken, lambda *_: {"_create": -1, "_attach": None}[broken])
    try:
        x = torch.full((2**17,), float(c.rank))
        c.world.all_reduce(x)
        conformance.expect(x, torch.full_like(x, 1.0))
        assert slots_of(c) is None
    finally:
        setattr(shared_memory, broken, usual)


@pytest.mark.parametrize("broken", ["_create", "_attach"])
def test_where_one_cannot_see_it_all_use_the_network(broken: str) -> None:
    run("gloo", 2, without, broken)


def test_memory_of_another_than_the_one_that_is_meant_is_not_taken() -> None:
    descriptor = shared_memory._create(1)
    try:
        assert shared_memory._attach(os.getpid(), descriptor, 1) is not None
        assert shared_memory._attach(os.getpid(), descriptor, 2) is None
        assert shared_memory._attach(os.getpid(), 2**20, 1) is None
    finally:
        os.close(descriptor)


def open_memories() -> int:
    gc.collect()
    mapped = Path("/proc/self/maps").read_text(encoding="utf-8").count("bagualu-exchange")
    descriptors = [os.readlink(link) for link in Path("/proc/self/fd").iterdir() if link.is_symlink()]
    return mapped + sum("bagualu-exchange" in target for target in descriptors)


def use_and_close(c: Communicator) -> tuple[int, int]:
    c.world.all_reduce(torch.zeros(2**17))
    used = open_memories()
    c.close()
    return used, open_memories()


def test_nothing_is_left_when_it_is_closed() -> None:
    assert run("gloo", 2, use_and_close) == [(2, 0), (2, 0)]


def lose_a_rank(c: Communicator) -> None:
    c.world.all_reduce(torch.zeros(2**17))
    if c.rank == 1:
        raise KeyError("gone")
    with pytest.raises(CommunicationError):
        c.world.all_reduce(torch.zeros(2**17))
    raise CommunicationError("noticed")


def test_a_member_that_is_gone_is_noticed() -> None:
    with pytest.raises(WorkerFailed, match=r"gone[\s\S]*then .*noticed"):
        run("gloo", 2, lose_a_rank)


def nobody_shares(c: Communicator) -> None:
    c.world.all_reduce(torch.zeros(2**15))  # too small
    c.world.all_reduce(torch.zeros(2**20 + 1))  # too large
    assert slots_of(c) is None


def test_only_what_gains_by_it_goes_through_memory() -> None:
    run("gloo", 2, nobody_shares)

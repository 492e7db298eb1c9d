"""What members on one machine exchange through memory is what they would have exchanged over the network, and nothing is left."""

import errno
import gc
import hashlib
import os
import resource
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from bagualu.comm import gloo, pipes, shared_memory
from bagualu.comm.errors import CommunicationError
from bagualu.comm.gloo import GlooTransport
from bagualu.comm.group import Communicator, Group
from tests.comm import test_conformance as conformance
from tests.harness import WorkerFailed, run

MANY = 2**17
"""Elements of float32 that one memory access does not copy."""


def transport(group: Group) -> GlooTransport:
    assert isinstance(group.transport, GlooTransport)
    return group.transport


def exchanges(group: Group) -> int:
    """How many have gone through memory."""
    slots = transport(group).slots
    return slots._exchanges if slots else 0


@contextmanager
def replaced(owner: object, name: str, value: object) -> Iterator[None]:
    usual = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, usual)


def through_memory(c: Communicator, function: Callable[..., None], *args: object) -> None:
    function(c, *args)
    assert exchanges(c.world)


@pytest.mark.parametrize("size", conformance.SIZES)
class TestConformance:
    @pytest.mark.parametrize("dtype", conformance.DTYPES, ids=str)
    def test_collectives(self, size: int, dtype: torch.dtype) -> None:
        run("gloo", size, through_memory, conformance.collectives, dtype)

    def test_in_place(self, size: int) -> None:
        run("gloo", size, through_memory, conformance.in_place)

    def test_uneven_all_to_all(self, size: int) -> None:
        run("gloo", size, through_memory, conformance.uneven_all_to_all)

    def test_waiting_again(self, size: int) -> None:
        run("gloo", size, through_memory, conformance.waiting_again)


def test_reduce_scatter_rounds_once() -> None:
    run("gloo", 4, through_memory, conformance.sums_are_rounded_once)


def subgroups(c: Communicator) -> None:
    # Groups of the same ranks do not mix, and members of one go on while the other still reads.
    parity = c.group(tuple(range(c.rank % 2, c.size, 2)), "parity")
    again = c.group(parity.ranks, "again")
    for number in range(5):
        for place, group in enumerate((parity, again, c.world)):
            x = torch.full((MANY,), float(100 * number + 10 * place + c.rank))
            if c.rank == number % c.size:
                time.sleep(0.005)
            whole = torch.empty(group.size * MANY)
            group.all_gather(whole, x)
            conformance.expect(whole[::MANY], torch.tensor([100.0 * number + 10 * place + rank for rank in group.ranks]))
    assert [exchanges(group) for group in (parity, again, c.world)] == [5, 5, 5]


def test_subgroups() -> None:
    run("gloo", 4, subgroups)


def all_to_all(c: Communicator, x: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """Member i sends member j about rows[i, j] rows of 128 elements, which repeat `x`. Some members get none, and some more than
    fits into shared memory."""
    rows = torch.where(rows % 5 == 0, 0, rows)
    sent, received = rows[c.rank].tolist(), rows[:, c.rank].tolist()
    given = x.repeat(3 * c.size)[: 128 * sum(sent)].view(-1, 128)
    result = x.new_empty(sum(received), 128)
    c.world.all_to_all(result, given, received, sent)
    return result


def draw(c: Communicator, through_memory: bool) -> list[str]:
    """Digests of results of random collectives, one after the other, with delays of every member's own."""
    values, own = torch.Generator().manual_seed(c.rank), torch.Generator().manual_seed(c.rank + 100)
    drawn = torch.Generator().manual_seed(7)  # the same on every member
    digests = []
    with replaced(transport(c.world), "slots", transport(c.world).slots if through_memory else None):
        for number in range(60):
            kind, elements = (int(torch.randint(4, (), generator=drawn)), 2 ** int(torch.randint(12, 21, (), generator=drawn)))
            x = torch.randn(elements, generator=values).to((torch.float32, torch.bfloat16, torch.float64)[number % 3])
            if torch.randint(3, (), generator=own) == 0:
                time.sleep(0.002)
            result = x if kind == 0 else x.new_empty(c.size * elements if kind == 1 else elements // c.size)
            if kind == 3:
                result = all_to_all(c, x, torch.randint(3 * elements // 128, (c.size, c.size), generator=drawn))
            elif kind == 0:
                c.world.all_reduce(x)
            elif kind == 1:
                c.world.all_gather(result, x)
            else:
                c.world.reduce_scatter(result, x)
            digests.append(hashlib.sha256(result.view(torch.uint8).numpy()).hexdigest())
        assert (exchanges(c.world) > 10) == through_memory
    return digests


@pytest.mark.parametrize("size", [2, 4])
def test_the_same_bits_as_over_the_network(size: int) -> None:
    assert run("gloo", size, draw, True) == run("gloo", size, draw, False)


def one_reads_late(c: Communicator) -> None:
    # Member 0 goes on as far as it can while member 1 has not read; what 1 then reads is what it was given.
    slots = transport(c.world).slots
    assert slots is not None
    read: list[float] = []

    def late(parts: list[torch.Tensor], output: torch.Tensor) -> None:
        time.sleep(0.02 * c.rank)
        summed(parts, output)

    summed = gloo._sum
    with replaced(gloo, "_sum", late):
        for number in range(8):
            x = torch.full((MANY,), float(10 * number + c.rank))
            c.world.all_reduce(x)
            conformance.expect(x, torch.full_like(x, 20.0 * number + 1))
            read.append(x[0].item())
    assert len(read) == slots._exchanges == 8


def test_a_slow_reader_finds_what_it_was_given() -> None:
    run("gloo", 2, one_reads_late)


def one_reads_parts_late(c: Communicator) -> None:
    slots, read = transport(c.world).slots, []
    assert slots is not None
    wait = gloo.HeaderExchange.wait

    def late(exchange: gloo.HeaderExchange) -> None:
        wait(exchange)
        time.sleep(0.02 * c.rank)

    with replaced(gloo.HeaderExchange, "wait", late):
        for number in range(8):
            x = torch.full((2 * c.size, 64), float(10 * number + c.rank))
            output = torch.empty_like(x)
            c.world.all_to_all(output, x)
            conformance.expect(output, 10.0 * number + torch.arange(c.size).repeat_interleave(2)[:, None].expand(-1, 64))
            read.append(output)
    assert len(read) == slots._exchanges == 8


@pytest.mark.parametrize("size", [2, 3])
def test_a_slow_reader_of_parts_finds_what_it_was_given(size: int) -> None:
    run("gloo", size, one_reads_parts_late)


def lent(c: Communicator) -> None:
    sizes, dtypes = (c.size, 5 * c.size, 3 * 2**18), (torch.float32, torch.float64, torch.float32)
    own = torch.Generator().manual_seed(c.rank)
    buffers = [c.world.lend(size, dtype) for size, dtype in zip(sizes, dtypes, strict=True)]
    for turn in range(3):
        works, outputs = [], []
        for place, buffer in enumerate(buffers):
            assert buffer is not None
            assert turn or not buffer.any()
            buffer.copy_(conformance.value(10 * turn + c.rank, (buffer.numel(),), buffer.dtype))
            outputs.append(buffer.chunk(c.size)[c.rank] if place else torch.empty(1))  # in place, and elsewhere
            works.append(c.world.reduce_scatter(outputs[-1], buffer, asynchronous=place != 1))
        for place in torch.randperm(3, generator=own).tolist():
            works[place].wait()
        for buffer, output in zip(buffers, outputs, strict=True):
            assert buffer is not None
            given = torch.stack([conformance.value(10 * turn + rank, (buffer.numel(),), buffer.dtype) for rank in range(c.size)])
            conformance.expect(output, given.sum(0).chunk(c.size)[c.rank])
        c.world.barrier()
    assert exchanges(c.world) == 0
    mapped = mappings()
    del buffers, buffer, outputs, output, works
    assert mappings() == mapped - 3 * c.size
    again = c.world.lend(c.size, torch.float32)
    assert again is not None
    part = torch.empty(1)
    c.world.reduce_scatter(part, again[:].fill_(c.rank))  # a view goes as anything does
    assert part.item() == sum(range(c.size))


@pytest.mark.parametrize("size", [2, 3])
def test_what_is_lent_is_read_where_it_lies(size: int) -> None:
    run("gloo", size, lent)


def requires_gradients(c: Communicator) -> None:
    for size in (4, MANY):
        x = torch.ones(size, requires_grad=True)
        c.world.all_reduce(x)
        conformance.expect(x.detach(), torch.full((size,), 2.0))


def test_a_tensor_that_requires_gradients_is_summed_like_any_other() -> None:
    run("gloo", 2, requires_gradients)


def no_more() -> tuple[int, int]:
    raise OSError(errno.EMFILE, "Too many open files")


def without(c: Communicator, broken: str) -> None:
    """Member 1 cannot make or see memory, or not enough of it, or make pipes."""
    ranks, piped = tuple(range(c.size)), open_pipes()
    if broken == "limit":
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (2**20 if c.rank == 1 else soft, hard))
        group = c.group(ranks, "limited")
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    elif c.rank == 1:
        owner, failing = {
            "create": (shared_memory, lambda *_: -1), "attach": (shared_memory, lambda *_: None), "pipe": (os, no_more),
        }[broken]  # fmt: skip
        with replaced(owner, broken, failing):
            group = c.group(ranks, "without")
    else:
        group = c.group(ranks, "without")
    assert transport(group).slots is None
    assert (open_descriptors(), open_pipes()) == (0, piped)
    x = torch.full((MANY,), float(c.rank))
    group.all_reduce(x)
    conformance.expect(x, torch.full_like(x, 1.0))


@pytest.mark.parametrize("broken", ["create", "attach", "limit", "pipe"])
def test_where_one_has_none_all_use_the_network(broken: str) -> None:
    run("gloo", 2, without, broken)


def test_what_is_not_the_memory_that_is_meant_is_left_alone(tmp_path: Path) -> None:
    file, token = tmp_path / "short", int.from_bytes(b"somebody", sys.byteorder)
    file.write_bytes(b"somebody's data")
    ours = shared_memory.create(2**12, 1)
    empty = os.memfd_create(shared_memory._NAME)
    with file.open("rb") as data:
        assert shared_memory.attach(2**12, os.getpid(), ours, 1) is not None
        assert shared_memory.attach(2**12, os.getpid(), ours, 2) is None
        assert shared_memory.attach(2**12, os.getpid(), empty, 0) is None
        assert shared_memory.attach(2**12, os.getpid(), data.fileno(), token) is None
        assert shared_memory.attach(2**12, os.getpid(), 2**20, 1) is None
    assert file.read_bytes() == b"somebody's data"
    assert os.fstat(empty).st_size == 0
    os.close(ours)
    os.close(empty)


def open_descriptors() -> int:
    gc.collect()
    return sum(
        f"/memfd:{shared_memory._NAME}" in os.readlink(link) for link in Path("/proc/self/fd").iterdir() if link.is_symlink()
    )


def open_pipes() -> int:
    """How many lead to or come from other processes. Gloo has both ends of its own."""
    links = Counter(os.readlink(link) for link in Path("/proc/self/fd").iterdir() if link.is_symlink())
    return sum(link.startswith("pipe:") and ends == 1 for link, ends in links.items())


def mappings() -> int:
    gc.collect()
    return Path("/proc/self/maps").read_text(encoding="utf-8").count(shared_memory._NAME)


def use_and_close(c: Communicator) -> tuple[int, int, int]:
    lent = c.world.lend(8, torch.float32)
    mapped, piped = mappings(), open_pipes()
    c.close()
    del lent
    return mapped - mappings(), open_descriptors(), piped - open_pipes()


def test_nothing_is_left_when_it_is_closed() -> None:
    assert run("gloo", 2, use_and_close) == [
        (4, 0, 2),
        (4, 0, 2),
    ]  # slots and tensors of both, a pipe to and a pipe from the other


def lose_a_rank(c: Communicator) -> None:
    c.world.all_reduce(torch.zeros(MANY))
    if c.rank == 1:
        raise KeyError("gone")
    with pytest.raises(CommunicationError, match="all_reduce in group world of ranks"):
        c.world.all_reduce(torch.zeros(MANY))
    raise CommunicationError("noticed")


def test_a_member_that_is_gone_is_noticed() -> None:
    with pytest.raises(WorkerFailed, match=r"gone[\s\S]*then .*noticed"):
        run("gloo", 2, lose_a_rank)


def wait_for_a_silent_one(c: Communicator) -> None:
    silent = transport(c.group(tuple(range(c.size)), "silent"))
    assert silent._pipes is not None
    silent._pipes._timeout_seconds = 0.1
    if c.rank == 0:
        with pytest.raises(CommunicationError, match=r"^barrier in group silent of ranks \[0, 1\] failed: rank 1 has sent nothing "
                                                     r"for 0.1 s$"):  # fmt: skip
            silent.barrier().wait()
    c.world.barrier()


def test_a_member_that_hangs_is_noticed() -> None:
    run("gloo", 2, wait_for_a_silent_one)


def own_pipe() -> pipes.Pipes:
    """From this process to itself."""
    reading, writing = os.pipe()
    return pipes.Pipes({1: writing}, {1: reading}, 0.1)


def test_numbers_can_be_read_in_any_order() -> None:
    both = own_pipe()
    for number in range(3):
        both.send(1, number % 2, number, (number, 0, 0, 0))
    assert [both.receive(1, number % 2, number)[0] for number in (1, 2, 0)] == [1, 2, 0]
    both.close()


def fill(full: pipes.Pipes) -> None:
    for number in range(20_000):  # a pipe holds 64 KiB
        full.send(1, 0, number, (number, 0, 0, 0))


def test_two_that_send_more_than_pipes_hold_do_not_wait_for_each_other() -> None:
    both = own_pipe()
    fill(both)
    assert [both.receive(1, 0, number)[0] for number in range(20_000)] == list(range(20_000))
    unread = pipes.Pipes(both._writing, {}, 0.1)
    with pytest.raises(ConnectionError, match=r"^has read nothing for 0.1 s$"):
        fill(unread)
    both.close()


def test_the_end_of_one_is_not_taken_for_that_of_another() -> None:
    both, (from_another, to_another) = own_pipe(), os.pipe()
    os.close(to_another)
    slow = pipes.Pipes(both._writing, {2: from_another}, 0.1)
    with pytest.raises(ConnectionError, match=r"^has read nothing for 0.1 s$"):
        fill(slow)
    with pytest.raises(ConnectionError, match=r"^has ended$"):
        slow.receive(2, 0, 0)
    both.close()
    os.close(from_another)


def unalike(c: Communicator, what: str) -> None:
    x = torch.zeros(MANY * (2 if what == "size" and c.rank else 1))
    if what == "op" and c.rank:
        c.world.all_gather(torch.empty(2 * MANY), x)
    elif what == "rows":
        c.world.all_to_all(torch.empty(8 + c.rank, 64), torch.empty(8, 64), [4 + c.rank, 4])
    elif what == "lend":
        c.world.lend(8 + c.rank, torch.float32)
    elif what == "order":
        first, second = c.world.lend(8, torch.float32), c.world.lend(16, torch.float32)
        assert first is not None
        assert second is not None
        given = (second, first) if c.rank else (first, second)
        for one in given:
            c.world.reduce_scatter(torch.empty(one.numel() // 2), one)
    else:
        c.world.all_reduce(x)


@pytest.mark.parametrize("what", ["size", "op", "rows", "lend", "order"])
def test_members_that_call_different_things_are_told_so(what: str) -> None:
    with pytest.raises(WorkerFailed, match=r"CommunicationError: .* different collectives: .* on another, .* on this one"):
        run("gloo", 2, unalike, what)


def nobody_shares(c: Communicator) -> None:
    c.world.all_reduce(torch.zeros(shared_memory.SLOT_BYTES // 4 + 1))
    c.world.all_reduce(torch.zeros(MANY), asynchronous=True).wait()
    rows = torch.zeros(2, 1)
    c.world.all_to_all(torch.empty_like(rows), rows, asynchronous=True).wait()
    assert exchanges(c.world) == 0
    c.world.all_reduce(torch.zeros(1))
    c.world.all_to_all(torch.empty_like(rows), rows)
    assert exchanges(c.world) == 2


def test_only_what_gains_by_it_goes_through_memory() -> None:
    run("gloo", 2, nobody_shares)

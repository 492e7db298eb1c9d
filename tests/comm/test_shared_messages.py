"""Messages through shared memory arrive whole, in order, whatever is under way, and nothing is left."""

import gc
import os
from pathlib import Path

import pytest
import torch

from bagualu.comm import shared_messages
from bagualu.comm.errors import CommunicationError
from bagualu.comm.gloo import GlooTransport
from bagualu.comm.group import Communicator, Group
from bagualu.comm.shared_messages import SharedMessages
from tests.comm.test_conformance import expect
from tests.harness import WorkerFailed, run

DTYPES = (torch.float32, torch.bfloat16, torch.float64, torch.int64, torch.bool)


def messages(group: Group) -> SharedMessages:
    assert isinstance(group.transport, GlooTransport)
    assert group.transport._messages is not None
    return group.transport._messages


def buffers(of: SharedMessages) -> int:
    """How many it has made."""
    return sum(len(some) for some in (*of._free.values(), *of._under_way.values()))


def content(sender: int, receiver: int, number: int, turn: int, drawn: torch.Generator) -> torch.Tensor:
    shape = torch.randint(0, 60, (2,), generator=drawn).tolist()
    values = torch.arange(shape[0] * shape[1]).reshape(shape) + 7 * sender + 3 * receiver + number + 11 * turn
    return values.to(DTYPES[number % len(DTYPES)])


def converse(c: Communicator) -> None:
    # Everybody sends all its messages before it reads one, changes what it has sent, and waits in an order of its own.
    own = torch.Generator().manual_seed(c.rank)
    others = [other for other in range(c.size) if other != c.rank]
    for turn in range(3):
        pending = []
        for other in others:
            there, back = (torch.Generator().manual_seed(100 * a + b) for a, b in ((c.rank, other), (other, c.rank)))
            for number in range(10):
                sent = content(c.rank, other, number, turn, there)
                c.world.send(sent, other, asynchronous=number % 2 == 0).wait()
                sent.zero_()
                expected = content(other, c.rank, number, turn, back)
                found = torch.full_like(expected, 1)
                pending.append((c.world.receive(found, other, asynchronous=True), found, expected))
        for place in torch.randperm(len(pending), generator=own).tolist():
            work, found, expected = pending[place]
            work.wait()
            work.wait()
            expect(found, expected)
        c.world.barrier()
    assert buffers(messages(c.world)) <= 10 * len(others)  # the buffers of the first turn serve the later ones


@pytest.mark.parametrize("size", [2, 4])
def test_messages_arrive_whole_and_in_order(size: int) -> None:
    run("gloo", size, converse)


def take_turns(c: Communicator) -> int:
    x = torch.full((1000,), float(c.rank))
    for _ in range(50):
        for sender in (0, 1):
            if c.rank == sender:
                c.world.send(x, 1 - c.rank)
            else:
                c.world.receive(x, 1 - c.rank)
    return buffers(messages(c.world))


def test_a_buffer_serves_again_once_it_has_been_read() -> None:
    assert max(run("gloo", 2, take_turns)) <= 2


def send_large_and_small_ones(c: Communicator) -> int:
    """Returns how many buffers there are."""
    other = 1 - c.rank
    numbers = [2**21 + 1, 5, 2**21, 2**21 + 2, 7]  # of float32; 8 MiB hold 2**21
    sent = [c.world.send(torch.full((count,), 1.0 * place + 10 * c.rank), other, True) for place, count in enumerate(numbers)]
    found = [torch.empty(count) for count in numbers]
    for work in [*sent, *(c.world.receive(one, other, True) for one in found)]:
        work.wait()
    for place, one in enumerate(found):
        expect(one, torch.full_like(one, 1.0 * place + 10 * other))
    return buffers(messages(c.world))


def test_messages_too_large_for_buffers_take_the_network() -> None:
    assert run("gloo", 2, send_large_and_small_ones) == [3, 3]


def unalike(c: Communicator, what: str) -> None:
    if what == "size":
        if c.rank == 0:
            c.world.send(torch.zeros(8), 1)
        else:
            c.world.receive(torch.zeros(9), 0)
    elif c.rank == 1:
        raise KeyError("gone")
    else:
        with pytest.raises(CommunicationError, match=r"^receive in group world of ranks \[0, 1\] failed: rank 1 has ended$"):
            c.world.receive(torch.zeros(8), 1)
        raise CommunicationError("noticed")


@pytest.mark.parametrize(
    ("what", "said"),
    [
        ("size", r"receive in group world of ranks \[0, 1\] failed: rank 0 has sent 32 bytes where 36 are expected"),
        ("gone", r"gone[\s\S]*then .*noticed"),
    ],
)
def test_what_cannot_be_received_is_said(what: str, said: str) -> None:
    with pytest.raises(WorkerFailed, match=said):
        run("gloo", 2, unalike, what)


def no_more_memory(c: Communicator) -> None:
    usual = shared_messages.create
    shared_messages.create = lambda nbytes, token: -1
    try:
        with pytest.raises(CommunicationError, match=r"^cannot share 40 bytes for a message; .*ulimit"):
            c.world.send(torch.zeros(10), 1 - c.rank)
    finally:
        shared_messages.create = usual


def test_memory_that_cannot_be_had_is_said() -> None:
    run("gloo", 2, no_more_memory)


def left() -> int:
    """Files and mappings of shared memory that this process has."""
    gc.collect()
    links = [os.readlink(link) for link in Path("/proc/self/fd").iterdir() if link.is_symlink()]
    return sum("bagualu-exchange" in one for one in (*links, *Path("/proc/self/maps").read_text(encoding="utf-8").splitlines()))


def send_and_close(c: Communicator) -> int:
    before = left()
    c.world.send(torch.zeros(2**16), 1 - c.rank)
    c.world.send(torch.zeros(2**16), 1 - c.rank)
    c.world.receive(torch.zeros(2**16), 1 - c.rank)  # the other message stays unread
    assert left() > before
    c.world.barrier()
    c.close()
    return left()


def test_nothing_is_left_when_it_is_closed() -> None:
    assert run("gloo", 2, send_and_close) == [0, 0]

"""Messages between the ranks of one machine through memory that sender and receiver map.

A sender copies its tensor into a buffer, and says through a pipe which one it is. The receiver copies it out when it waits for the
message, and says so, after which the buffer serves for another message. So nobody but these two computes for it: over loopback
threads of Gloo and of the kernel would, on the cores where the ranks compute.
"""

import os
from collections import Counter, defaultdict
from dataclasses import dataclass

import torch

from bagualu.comm.errors import CommunicationError
from bagualu.comm.pipes import Pipes
from bagualu.comm.shared_memory import attach, create, new_token

_START = 64
"""Where contents begin in a buffer, in bytes. Before them lies the buffer's number, by which `attach` knows it."""

_MESSAGES, _ANSWERS = 1, 2
"""Streams of the pipes; 0 is left to others."""


@dataclass
class _Buffer:
    number: int
    memory: torch.Tensor
    descriptor: int
    """-1 once the receiver has mapped the memory."""


class SharedMessages:
    """One rank's messages to and from the others of a group. Raises ConnectionError for another rank that has ended."""

    def __init__(self, pipes: Pipes) -> None:
        self._pipes = pipes
        self._sent: Counter[int] = Counter()
        self._asked_for: Counter[int] = Counter()
        self._free: dict[int, list[_Buffer]] = defaultdict(list)
        """By the position that maps them."""
        self._under_way: dict[int, dict[int, _Buffer]] = defaultdict(dict)
        """By receiver and number of the message."""
        self._mapped: dict[tuple[int, int], torch.Tensor] = {}
        """By sender and number of the buffer."""

    @torch.no_grad()
    def send(self, tensor: torch.Tensor, destination: int) -> None:
        """Sends a contiguous tensor, which may be changed from then on. Does not wait."""
        nbytes, number = tensor.numel() * tensor.itemsize, self._sent[destination]
        self._sent[destination] += 1
        buffer = self._under_way[destination][number] = self._buffer(destination, nbytes)
        buffer.memory[_START : _START + nbytes].view(tensor.dtype).copy_(tensor.view(-1))
        about = (nbytes, buffer.number, buffer.descriptor, buffer.memory.numel())
        self._pipes.send(destination, _MESSAGES, number, about)

    def ask_for(self, source: int) -> int:
        """Returns the number of the next message from `source`, for `receive`."""
        self._asked_for[source] += 1
        return self._asked_for[source] - 1

    @torch.no_grad()
    def receive(self, tensor: torch.Tensor, source: int, number: int) -> None:
        """Fills a contiguous tensor with a message, once it has come."""
        nbytes, buffer, descriptor, capacity = self._pipes.receive(source, _MESSAGES, number)
        if nbytes != tensor.numel() * tensor.itemsize:
            raise ConnectionError(f"has sent {nbytes} bytes where {tensor.numel() * tensor.itemsize} are expected")
        memory = self._mapped.get((source, buffer))
        if memory is None:
            memory = attach(capacity, self._pipes.processes[source], descriptor, buffer)
            if memory is None:
                raise ConnectionError(f"has sent {nbytes} bytes of memory that this process cannot map")
            self._mapped[source, buffer] = memory
        tensor.view(-1).copy_(memory[_START : _START + nbytes].view(tensor.dtype))
        self._pipes.send(source, _ANSWERS, number, (0, 0, 0, 0))

    def close(self) -> None:
        for buffers in (*self._free.values(), *(by_number.values() for by_number in self._under_way.values())):
            for buffer in buffers:
                _close(buffer)
        self._free.clear()
        self._under_way.clear()
        self._mapped.clear()

    def _buffer(self, destination: int, nbytes: int) -> _Buffer:
        """Returns the smallest free buffer that holds `nbytes`, or else a new one."""
        for number in list(self._under_way[destination]):
            if self._pipes.receive_if_there(destination, _ANSWERS, number):
                _close(buffer := self._under_way[destination].pop(number))
                self._free[destination].append(buffer)
        large_enough = [one for one in self._free[destination] if one.memory.numel() >= _START + nbytes]
        if large_enough:
            self._free[destination].remove(best := min(large_enough, key=lambda one: one.memory.numel()))
            return best
        number = new_token()  # were it counted, another group's buffer might be taken for it once its descriptor is used again
        descriptor = create(_START + nbytes, number)
        memory = attach(_START + nbytes, os.getpid(), descriptor, number)
        if memory is None:
            raise CommunicationError(f"cannot share {nbytes} bytes for a message; leave this machine more memory, or raise its "
                                     "limits of open files and of file sizes (ulimit)")  # fmt: skip
        return _Buffer(number, memory, descriptor)


def _close(buffer: _Buffer) -> None:
    if buffer.descriptor >= 0:
        os.close(buffer.descriptor)
        buffer.descriptor = -1

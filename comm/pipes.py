"""Pipes between the processes of one machine: a message of a few bytes wakes its receiver in a fraction of the time that a
connection over loopback takes, and a receiver notices at once that the sender has ended."""

import os
import select
import struct
from collections.abc import Callable, Sequence
from contextlib import suppress

import torch

Message = tuple[int, int, int, int]
_FRAME = struct.Struct("6q")
"""Stream, number and message. POSIX writes up to 512 bytes to a pipe as a whole or not at all."""


class Pipes:
    """One rank's ends of the pipes from every rank of a group to every other one. Used by one thread at a time.

    Messages have four numbers, and belong to a stream of messages for one purpose, in which the sender numbers them from 0.
    """

    def __init__(
        self, writing: dict[int, int], reading: dict[int, int], timeout_seconds: float, processes: Sequence[int] = ()
    ) -> None:  # fmt: skip
        """`writing` and `reading` map each other position to a file descriptor; see `open_pipes`."""
        self.processes = processes
        """The process of each position."""
        self._writing, self._reading, self._timeout_seconds = writing, reading, timeout_seconds
        self._early: dict[tuple[int, int, int], Message] = {}
        """Messages that nobody has asked for so far, by position, stream and number."""
        self._ended: set[int] = set()
        """Positions that have ended, as far as this rank has noticed."""
        for descriptor in writing.values():
            os.set_blocking(descriptor, False)

    def send(self, position: int, stream: int, number: int, message: Message) -> None:
        """Sends a message. While the pipe is full, reads what others have sent to this rank, so that no two ranks wait for each
        other. Raises ConnectionError if the receiver has ended, or reads nothing for `timeout_seconds`."""
        frame = _FRAME.pack(stream, number, *message)
        while True:
            try:
                os.write(self._writing[position], frame)
                return
            except BlockingIOError:
                self._wait_for_room(position)
            except OSError as error:
                raise ConnectionError("has ended") from error

    def receive(self, position: int, stream: int, number: int) -> Message:
        """Returns a message of `position`, once it has come; each can be received once. Raises ConnectionError if the sender has
        ended, or sends nothing for `timeout_seconds`."""
        while (position, stream, number) not in self._early:
            if not self._readable(position, self._timeout_seconds):
                raise ConnectionError(f"has sent nothing for {self._timeout_seconds:g} s")
            self._read_one(position)
        return self._early.pop((position, stream, number))

    def receive_if_there(self, position: int, stream: int, number: int) -> Message | None:
        """Returns a message of `position` if it has come. Raises ConnectionError if it has not and the sender has ended."""
        while (position, stream, number) not in self._early and self._readable(position, 0):
            self._read_one(position)
        return self._early.pop((position, stream, number), None)

    def close(self) -> None:
        """Closes this rank's ends, so that the other ranks notice that it has ended."""
        _close([*self._writing.values(), *self._reading.values()])
        self._writing, self._reading = {}, {}

    def _wait_for_room(self, position: int) -> None:
        sources = {descriptor: source for source, descriptor in self._reading.items() if source not in self._ended}
        poll = select.poll()
        poll.register(self._writing[position], select.POLLOUT)
        for descriptor in sources:
            poll.register(descriptor, select.POLLIN)
        ready = poll.poll(1e3 * self._timeout_seconds)
        if not ready:
            raise ConnectionError(f"has read nothing for {self._timeout_seconds:g} s")
        for descriptor, _ in ready:
            if descriptor in sources:
                with suppress(ConnectionError):  # whoever waits for a message of it will say so
                    self._read_one(sources[descriptor])

    def _readable(self, position: int, seconds: float) -> bool:
        poll = select.poll()
        poll.register(self._reading[position], select.POLLIN)
        return bool(poll.poll(1e3 * seconds))

    def _read_one(self, position: int) -> None:
        frame = os.read(self._reading[position], _FRAME.size)
        if len(frame) < _FRAME.size:
            self._ended.add(position)
            raise ConnectionError("has ended")
        stream, number, *message = _FRAME.unpack(frame)
        self._early[position, stream, number] = tuple(message)


def open_pipes(position: int, size: int, gather: Callable[[torch.Tensor], torch.Tensor], timeout_seconds: float) -> Pipes | None:
    """Makes the pipes of a group whose ranks see each other's processes, as they do if `shared_memory.share` has succeeded.

    Returns None on every rank if any rank cannot open the pipe of another. `gather` stacks the int64 vectors that the ranks pass
    to it into a matrix.
    """
    others = [other for other in range(size) if other != position]
    made: dict[int, tuple[int, int]] = {}
    reading: dict[int, int] = {}
    with suppress(OSError):
        for other in others:
            made[other] = os.pipe()
    ends = [made[other][0] if other in made else -1 for other in range(size)]
    rows = gather(torch.tensor([os.getpid(), *ends])).tolist()
    with suppress(OSError):
        for other in others:
            reading[other] = os.open(f"/proc/{rows[other][0]}/fd/{rows[other][1 + position]}", os.O_RDONLY | os.O_NONBLOCK)
    opened_by_all = gather(torch.tensor([len(made) == len(reading) == len(others)])).bool().all().item()
    _close([end for end, _ in made.values()])
    if opened_by_all:
        return Pipes({other: end for other, (_, end) in made.items()}, reading, timeout_seconds, [row[0] for row in rows])
    _close([*reading.values(), *(end for _, end in made.values())])
    return None


def _close(descriptors: list[int]) -> None:
    for descriptor in descriptors:
        os.close(descriptor)

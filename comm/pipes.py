"""Pipes between the processes of one machine: a message of a few bytes wakes its receiver in a fraction of the time that a
connection over loopback takes, and a receiver notices at once that the sender has ended."""

import os
import select
from collections.abc import Callable
from contextlib import suppress

import torch


class Pipes:
    """One rank's ends of the pipes from every rank of a group to every other one. Used by one thread at a time."""

    def __init__(self, writing: dict[int, int], reading: dict[int, int], nbytes: int, timeout_seconds: float) -> None:
        """`writing` and `reading` map each other position to a file descriptor; see `open_pipes`. `nbytes`: of each message, at
        most 512, which POSIX writes as a whole or not at all."""
        self._writing, self._reading, self._nbytes, self._timeout_seconds = writing, reading, nbytes, timeout_seconds
        self._read = dict.fromkeys(reading, 0)
        """How many messages have been read from the pipe of each position."""
        self._early: dict[tuple[int, int], bytes] = {}
        """Messages that nobody has asked for so far, by position and number."""
        for descriptor in writing.values():
            os.set_blocking(descriptor, False)

    def send(self, position: int, message: bytes) -> None:
        """Sends a message. While the pipe is full, reads what others have sent to this rank, so that no two ranks wait for each
        other. Raises ConnectionError if the receiver has ended, or reads nothing for `timeout_seconds`."""
        while True:
            try:
                os.write(self._writing[position], message)
                return
            except BlockingIOError:
                self._wait_for_room(position)
            except OSError as error:
                raise ConnectionError("has ended") from error

    def receive(self, position: int, number: int) -> bytes:
        """Returns message `number` (from 0) of `position`, once it has come; each can be received once. Raises ConnectionError if
        the sender has ended, or sends nothing for `timeout_seconds`."""
        while self._read[position] <= number:
            poll = select.poll()
            poll.register(self._reading[position], select.POLLIN)
            if not poll.poll(1e3 * self._timeout_seconds):
                raise ConnectionError(f"has sent nothing for {self._timeout_seconds:g} s")
            self._read_one(position)
        return self._early.pop((position, number))

    def close(self) -> None:
        """Closes this rank's ends, so that the other ranks notice that it has ended."""
        _close([*self._writing.values(), *self._reading.values()])
        self._writing, self._reading = {}, {}

    def _wait_for_room(self, position: int) -> None:
        poll, sources = select.poll(), {descriptor: source for source, descriptor in self._reading.items()}
        poll.register(self._writing[position], select.POLLOUT)
        for descriptor in sources:
            poll.register(descriptor, select.POLLIN)
        ready = poll.poll(1e3 * self._timeout_seconds)
        if not ready:
            raise ConnectionError(f"has read nothing for {self._timeout_seconds:g} s")
        for descriptor, _ in ready:
            if descriptor in sources:
                self._read_one(sources[descriptor])

    def _read_one(self, position: int) -> None:
        message = os.read(self._reading[position], self._nbytes)
        if len(message) < self._nbytes:
            raise ConnectionError("has ended")
        self._early[position, self._read[position]] = message
        self._read[position] += 1


def open_pipes(
    position: int, size: int, gather: Callable[[torch.Tensor], torch.Tensor], nbytes: int, timeout_seconds: float
) -> Pipes | None:
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
        return Pipes({other: end for other, (_, end) in made.items()}, reading, nbytes, timeout_seconds)
    _close([*reading.values(), *(end for _, end in made.values())])
    return None


def _close(descriptors: list[int]) -> None:
    for descriptor in descriptors:
        os.close(descriptor)

"""Memory that the ranks of one machine share, so that a group can exchange tensors without the network.

Every rank has two slots that alternate. For an exchange, it copies its tensor into its next slot and sends each other rank a
header of a few bytes through a pipe (pipes.py); once it has received all headers, it reads the slots of the others.

Two slots suffice, because a rank ends each exchange before it begins the next. Exchange n reuses the slots of exchange n - 2. A
rank that has ended exchange n - 1 holds a header for it from every other rank, and each of them had ended exchange n - 2, and so
had read those slots, before it sent that header.
"""

import os
import sys
from collections.abc import Callable

import torch

SLOT_BYTES = 2**23
SLOTS = 2
_ALIGNMENT = 64
"""Parts begin at multiples of this many bytes."""
_NAME = "bagualu-exchange"
"""Name of the memory, shown only in /proc. No file system holds the memory; it is freed when the last process that maps it ends."""


class Slots:
    """One rank's view of the slots of all ranks in a group."""

    def __init__(self, memories: list[torch.Tensor], position: int) -> None:
        """`memories[i]` holds the slots of position i as bytes [SLOTS * SLOT_BYTES]; see `share`."""
        self._memories = memories
        self._position = position
        self._exchanges = 0

    @torch.no_grad()
    def exchange(self, contents: torch.Tensor, exchange_headers: Callable[[], None]) -> list[torch.Tensor]:
        """Returns the contents of every position; read them before the next exchange.

        `contents` has the same shape and dtype on every rank and at most SLOT_BYTES bytes. `exchange_headers` tells the other ranks
        that this rank has copied its contents, and returns once each of them has told this rank likewise.
        """
        slots = [slot[: contents.nbytes].view(contents.dtype) for slot in self._next()]
        slots[self._position].copy_(contents)
        exchange_headers()
        return [*slots[: self._position], contents, *slots[self._position + 1 :]]

    @torch.no_grad()
    def exchange_parts(
        self, outgoing: list[torch.Tensor], incoming: list[torch.Tensor], exchange_headers: Callable[[], None]
    ) -> None:
        """Fills incoming[i], which is contiguous, with the part outgoing[p] of every other position i, where p is this rank's own.

        A part takes at most `part_bytes`. `exchange_headers` as for `exchange`.
        """
        size = self.part_bytes
        slots = [slot[: size * len(outgoing)].view(-1, size) for slot in self._next()]  # each by position of the receiver
        for position, part in enumerate(outgoing):
            if position != self._position:
                slots[self._position][position][: part.nbytes].view(part.dtype).copy_(part.view(-1))
        exchange_headers()
        for position, part in enumerate(incoming):
            if position != self._position:
                part.view(-1).copy_(slots[position][self._position][: part.nbytes].view(part.dtype))

    @property
    def part_bytes(self) -> int:
        """The size of the largest part of `exchange_parts`, in bytes."""
        return SLOT_BYTES // len(self._memories) // _ALIGNMENT * _ALIGNMENT

    def _next(self) -> list[torch.Tensor]:
        """Begins the next exchange, and returns the slots for it of all positions."""
        start = self._exchanges % SLOTS * SLOT_BYTES
        self._exchanges += 1
        return [memory[start : start + SLOT_BYTES] for memory in self._memories]


def share(nbytes: int, gather: Callable[[torch.Tensor], torch.Tensor]) -> list[torch.Tensor] | None:
    """Creates `nbytes` zero bytes on every rank and returns the memory of all ranks, by position, mapped into this process.

    Returns None on every rank if any rank cannot map the memory of another. `gather` stacks the int64 vectors that the ranks pass
    to it into a matrix. The operating system allocates a page of the memory when it is first touched.
    """
    descriptor = create(nbytes, token := new_token())
    try:
        addresses = gather(torch.tensor([os.getpid(), descriptor, token])).tolist()
        memories = [attach(nbytes, *address) for address in addresses]
        mapped_by_all = gather(torch.tensor([None not in memories])).bool().all().item()
        if descriptor >= 0:
            os.pwrite(descriptor, bytes(8), 0)
    finally:
        if descriptor >= 0:
            os.close(descriptor)
    return [memory for memory in memories if memory is not None] if mapped_by_all else None


def new_token() -> int:
    """Returns a number that no other memory has."""
    return int.from_bytes(os.urandom(7), sys.byteorder)


def create(nbytes: int, token: int) -> int:
    """Returns a file descriptor of new memory that begins with `token`, of 8 bytes, or -1 if the system cannot provide it."""
    try:
        descriptor = os.memfd_create(_NAME)
    except (AttributeError, OSError):
        return -1
    try:
        os.truncate(descriptor, nbytes)
        os.pwrite(descriptor, token.to_bytes(8, sys.byteorder), 0)
    except OSError:
        os.close(descriptor)
        return -1
    return descriptor


def attach(nbytes: int, process: int, descriptor: int, token: int) -> torch.Tensor | None:
    """Maps the memory behind a file descriptor of another process (or of this one); returns None if this process cannot.

    On another machine or in another namespace the same numbers may denote an unrelated file. So its name and then its first bytes
    are checked before it is mapped, and this function never writes to it. A process whose network is another one, such as that of
    another container, counts as one on another machine: that it is cut off must be noticed.
    """
    path = f"/proc/{process}/fd/{descriptor}"
    try:
        if _network_of(process) != _network_of(os.getpid()) or not os.readlink(path).startswith(f"/memfd:{_NAME}"):
            return None
        opened = os.open(path, os.O_RDWR)
    except OSError:
        return None
    try:
        if os.pread(opened, 8, 0) != token.to_bytes(8, sys.byteorder):
            return None
        return torch.from_file(f"/proc/self/fd/{opened}", shared=True, size=nbytes, dtype=torch.uint8)
    except (OSError, RuntimeError):
        return None
    finally:
        os.close(opened)


def _network_of(process: int) -> str:
    """Returns the name of the network namespace of a process. Raises OSError."""
    return os.readlink(f"/proc/{process}/ns/net")

"""Memory that the ranks of one machine share, for what they exchange in a group: slots, and tensors that lie there for good.

Every member has two slots. It puts what it gives into the next one and tells the others so by a message of a few bytes; who has
heard from all of them reads from their slots. The messages go over the network like any other, so a lost or hung member is
noticed just as without the memory.

A member ends one exchange before it begins the next. So whoever has ended exchange n - 1 has heard that the others had begun it,
and before that ended exchange n - 2: what lay in the slot that exchange n takes has been read.
"""

import os
import sys
from collections.abc import Callable

import torch

SLOT_BYTES = 2**23
SLOTS = 2
_NAME = "bagualu-exchange"
"""Seen in /proc only: it is in no file system, and gone when the last process that sees it is."""


class Slots:
    """One member's view of the memory of all members of a group."""

    def __init__(self, memories: list[torch.Tensor], position: int) -> None:
        """`memories`: for each position its bytes [SLOTS * SLOT_BYTES]; see `share`."""
        self._memories = memories
        self._position = position
        self._exchanges = 0

    def exchange(self, contents: torch.Tensor, tell: Callable[[], None]) -> list[torch.Tensor]:
        """What every position gives, to be read before the next exchange. `contents` is what this one gives: of the same shape and
        dtype everywhere, SLOT_BYTES at most. `tell` tells the others that it is there, and returns when all have said so."""
        start = self._exchanges % SLOTS * SLOT_BYTES
        self._exchanges += 1
        given = [memory[start : start + contents.nbytes].view(contents.dtype) for memory in self._memories]
        given[self._position].copy_(contents)
        tell()
        return [*given[: self._position], contents, *given[self._position + 1 :]]


def share(nbytes: int, gather: Callable[[torch.Tensor], torch.Tensor]) -> list[torch.Tensor] | None:
    """`nbytes` zeros of every position, which all members see; None on every member where one of them cannot see another's.

    `gather` returns the members' rows of int64 as a matrix. Pages are taken when they are first touched.
    """
    token = int.from_bytes(os.urandom(7), sys.byteorder)
    descriptor = _create(nbytes, token)
    try:
        places = gather(torch.tensor([os.getpid(), descriptor, token])).tolist()
        found = [_attach(nbytes, *place) for place in places]
        seen_by_all = gather(torch.tensor([None not in found])).bool().all().item()
        if descriptor >= 0:
            os.pwrite(descriptor, bytes(8), 0)
    finally:
        if descriptor >= 0:
            os.close(descriptor)
    return [memory for memory in found if memory is not None] if seen_by_all else None


def _create(nbytes: int, token: int) -> int:
    """A descriptor of new memory that begins with `token`, or -1."""
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


def _attach(nbytes: int, process: int, descriptor: int, token: int) -> torch.Tensor | None:
    """The bytes of another process' memory, or of this one's, where it can be seen from here. Elsewhere (another machine, another
    namespace) the same numbers name something else, which is looked at and left alone."""
    place = f"/proc/{process}/fd/{descriptor}"
    try:
        if not os.readlink(place).startswith(f"/memfd:{_NAME}"):
            return None
        opened = os.open(place, os.O_RDWR)
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

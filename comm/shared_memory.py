"""Memory that the ranks of one machine share, for what they exchange in a group.

Every member has a few slots. It puts what it gives into its next one and tells the others so by a message of one byte; who has
heard from all of them reads from their slots. The messages go over the network like any other, so a lost or hung member is noticed
just as without the memory.

With S slots, a member finishes its exchange n - S / 2 before it begins exchange n. So whoever has heard of exchange n - S / 2 from
all the others, and finishing it takes that, knows that they have read all that lay in exchange n - S: its slot is free again.
"""

import os
import sys
from collections import deque
from collections.abc import Callable
from typing import TypeVar

import torch

from bagualu.comm.backend import Work

SLOT_BYTES = 2**22
SLOTS = 4
_Ends = TypeVar("_Ends", bound=Work)


class Slots:
    """One member's view of the memory of all members of a group."""

    def __init__(self, memories: list[torch.Tensor], position: int) -> None:
        """`memories`: for each position its bytes [SLOTS * SLOT_BYTES]; see `share`."""
        self._memories = memories
        self._position = position
        self._exchanges = 0
        self._under_way: deque[Work] = deque()

    def put(self, contents: torch.Tensor) -> list[torch.Tensor]:
        """Begin an exchange: `contents` [n], of the same n and dtype on every member and at most SLOT_BYTES, goes into this
        member's slot. Returns for every position what it gives: of others to be read when they have said so, of this one
        `contents`."""
        while len(self._under_way) >= SLOTS // 2:
            self._under_way.popleft().wait()
        start = self._exchanges % SLOTS * SLOT_BYTES
        self._exchanges += 1
        given = [memory[start : start + contents.nbytes].view(contents.dtype) for memory in self._memories]
        given[self._position].copy_(contents)
        given[self._position] = contents
        return given

    def begun(self, work: _Ends) -> _Ends:
        """`work` ends the exchange that `put` has begun: when it has been waited for, the others' slots have been read."""
        self._under_way.append(work)
        return work


def share(gather: Callable[[torch.Tensor], torch.Tensor]) -> list[torch.Tensor] | None:
    """Memory of every position, for `Slots`; None on every member where one of them cannot see that of another.

    `gather` returns the members' rows of int64 as a matrix. The memory has no name, and goes when the last of them is gone.
    """
    token = int.from_bytes(os.urandom(7), "little")
    descriptor = _create(token)
    places = gather(torch.tensor([os.getpid(), descriptor, token])).tolist()
    found = [_attach(*place) for place in places]
    seen_by_all = gather(torch.tensor([None not in found])).bool().all().item()
    if descriptor >= 0:
        os.close(descriptor)
    return [memory for memory in found if memory is not None] if seen_by_all else None


def _create(token: int) -> int:
    """A descriptor of new memory that begins with `token`, or -1."""
    try:
        descriptor = os.memfd_create("bagualu-exchange")
    except (AttributeError, OSError):
        return -1
    os.truncate(descriptor, SLOTS * SLOT_BYTES)
    os.pwrite(descriptor, token.to_bytes(8, sys.byteorder), 0)
    return descriptor


def _attach(process: int, descriptor: int, token: int) -> torch.Tensor | None:
    """The bytes of another process' memory, or of this one's, if it can be seen from here and is the one that is meant."""
    try:
        memory = torch.from_file(f"/proc/{process}/fd/{descriptor}", shared=True, size=SLOTS * SLOT_BYTES, dtype=torch.uint8)
    except RuntimeError:
        return None
    return memory if memory[:8].view(torch.int64).item() == token else None

"""What is written down of the communication of a rank: each call that it begins, and when it waits for its end.

These events do not depend on what the rank did before, so passes that do the same have equal events.
"""

from dataclasses import dataclass
from typing import Generic, TypeVar

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Communication:
    """A communication that the rank has begun."""

    kind: str
    """The method of `Transport`: all_reduce, all_gather, reduce_scatter, all_to_all, broadcast, send, receive, barrier or lend."""
    group: str
    """The name of the group, that of a mesh axis."""
    size: int
    """The number of ranks in the group."""
    bytes: int
    """The bytes of this rank's tensors: what it contributes; of a gather or a receive what it gets; of an all_to_all what it sends
    or receives, whichever is more."""
    peer: int | None = None
    """The position in the group to which a message goes or from which it, or a broadcast, comes; None for other kinds."""


@dataclass(frozen=True, slots=True)
class Waited:
    """The rank has waited until a call ended. A call that does not run beside anything else is followed by this at once."""

    kind: str
    group: str
    peer: int | None = None
    index: int = 0
    """Which of the calls of this kind, group and peer for which the rank has not waited yet, the oldest first."""


class Pending(Generic[T]):
    """The calls of a rank that have begun and for which it has not waited, each with something that stands for it."""

    def __init__(self) -> None:
        self._calls: dict[tuple[str, str, int | None], list[T]] = {}

    def begin(self, call: Communication, handle: T) -> None:
        """Adds a call that begins."""
        self._calls.setdefault((call.kind, call.group, call.peer), []).append(handle)

    def waited(self, call: Communication, handle: T) -> Waited:
        """Removes a call and returns the event that the rank has waited for it."""
        handles = self._calls[call.kind, call.group, call.peer]
        index = handles.index(handle)
        del handles[index]
        return Waited(call.kind, call.group, call.peer, index)

    def end(self, waited: Waited) -> T:
        """Removes the call for which the rank has waited, and returns what stands for it."""
        return self._calls[waited.kind, waited.group, waited.peer].pop(waited.index)

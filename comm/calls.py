"""What is written down of the communication of a rank: each call that it begins, and when it waits for its end."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Communication:
    """A communication that the rank has begun."""

    number: int
    """Counts the calls of the rank, from 0."""
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
    """The rank has waited until call `number` ended. A call that does not run beside anything else is followed by this at once."""

    number: int

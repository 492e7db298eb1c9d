"""What a trace consists of: the operators, communications, allocations and frees of a rank in one step, in order."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

from bagualu.comm.calls import Communication, Waited
from bagualu.parallel.pipeline.schedules.schedule import Action


class TensorType(NamedTuple):
    dtype: str
    """Without "torch.", e.g. bfloat16."""
    shape: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Operator:
    """A kernel that the rank runs. Views of tensors and allocations alone are none."""

    name: str
    """As torch calls it, e.g. aten.mm.default."""
    inputs: tuple[TensorType, ...]
    outputs: tuple[TensorType, ...]
    read_bytes: int
    written_bytes: int
    flops: int
    """Of matrix products and attention, a multiplication and an addition each; 0 for any other operator."""


@dataclass(frozen=True, slots=True)
class Allocation:
    """The rank takes memory: a new block, or more for one that changes its size."""

    block: int
    """An index into `RankTrace.kinds`."""
    bytes: int


@dataclass(frozen=True, slots=True)
class Free:
    """The rank gives memory back: a block, or a part of one that changes its size."""

    block: int
    bytes: int


Event = Operator | Communication | Waited | Allocation | Free


@dataclass(slots=True)
class Section:
    """Events that belong together: an action of the pipeline's program, or what a phase of the step does outside the program."""

    phase: str
    """The value of the `Phase` in which the section begins."""
    action: Action | None
    """The action: a pass for a micro-batch at a stage, or a message; None outside the program."""
    events: list[Event] = field(default_factory=list)
    """Not to be changed once the trace is made: sections of actions that do the same share this list."""


@dataclass
class RankTrace:
    """A step of a rank."""

    rank: int
    sections: list[Section]
    """The first, of the phase "start", allocates what the rank holds before the step."""
    kinds: list[str]
    """The kind (parallel/memory_kinds.py) of each block of memory."""

    def events(self) -> Iterator[tuple[Section, Event]]:
        """Yields each event with its section."""
        return ((section, event) for section in self.sections for event in section.events)

    def operators(self) -> Iterator[Operator]:
        return (event for _, event in self.events() if isinstance(event, Operator))

    def calls(self) -> Iterator[Communication]:
        """Yields the communications in the order in which the rank begins them."""
        return (event for _, event in self.events() if isinstance(event, Communication))

    def flops(self) -> int:
        """Returns the FLOPs of the step on this rank, with those of recomputation."""
        sizes: dict[int, int] = {}
        for section in self.sections:
            if (shared := id(section.events)) not in sizes:
                sizes[shared] = sum(event.flops for event in section.events if isinstance(event, Operator))
        return sum(sizes[id(section.events)] for section in self.sections)


@dataclass(frozen=True)
class Role:
    """The ranks at a pipeline coordinate that do the same in a step."""

    trace: RankTrace
    """The step of one of them."""
    ranks: int
    """The number of ranks of the world that do this."""
    pipeline: int
    """Their coordinate on the pipeline axis."""
    micro_batches: int
    """The number of micro-batches of each of them in a step."""
    coordinates: tuple[range, ...] = ()
    """Their coordinates on the fold axis (data x context); empty: all that there are."""


def changed_bytes(event: Event) -> int:
    """Returns the bytes by which `event` changes the memory that is held."""
    if isinstance(event, Allocation):
        return event.bytes
    return -event.bytes if isinstance(event, Free) else 0

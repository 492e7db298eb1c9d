"""What a section of a role takes: the items of its program (comm/clock.py), with their times."""

from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

from bagualu.comm.calls import Communication, Waited
from bagualu.comm.clock import Begin, Compute, Item, Lane, Mark, Prices, Wait
from bagualu.parallel.simulation.events import Allocation, Event, Free, Operator, Section, changed_bytes
from bagualu.parallel.simulation.lanes import Lanes, takes_time
from bagualu.parallel.simulation.step_parts import ATTENTION, OTHER_KERNELS, PRODUCTS


@dataclass(frozen=True)
class TimedSection:
    """What a section takes, apart from waiting."""

    items: tuple[Item, ...]
    """With a `Mark` at its begin, and one where the role holds most memory."""
    operators: Mapping[str, float]
    """Seconds of computation by kind of operator."""
    exposed: Mapping[str, float]
    """For each group, seconds of calls that count as computation among `items`, because nothing else can run beside them."""
    change_by_kind: Mapping[str, int]
    """Bytes that the role holds more after the section than before."""
    most_by_kind: Mapping[str, int]
    """Bytes that it holds more than before the section, at the first moment in it when it holds most."""

    @cached_property
    def busy_seconds(self) -> float:
        return sum(self.operators.values())

    @cached_property
    def change_bytes(self) -> int:
        return sum(self.change_by_kind.values())

    @cached_property
    def most_bytes(self) -> int:
        return sum(self.most_by_kind.values())


@dataclass
class SectionTimer:
    """Times the sections of a role, each distinct one once."""

    member: int
    seconds: Callable[[Operator], float]
    lanes: Lanes
    prices: Prices
    kinds: list[str]
    """The kinds of the role's blocks of memory."""
    each_call: bool
    """Whether to keep each call apart, even if nothing can run beside it."""
    each_operator: bool
    """Whether to keep each operator apart."""
    again: bool = False
    """Whether to time each section anew, also one like others."""
    _alone: set[Lane] = field(init=False)
    _known: dict[int, TimedSection] = field(default_factory=dict)
    _seconds: dict[int, float] = field(default_factory=dict)
    """The seconds of an operator, by its id."""

    def __post_init__(self) -> None:
        self._alone = set() if self.each_call else self.lanes.alone(self.member, self.prices)

    def timed(self, section: Section) -> TimedSection:
        """Returns what a section takes, the same object for sections that share their events."""
        if self.again or (timed := self._known.get(id(section.events))) is None:
            timed = self._known[id(section.events)] = self._time(section.events)
        return timed

    def _time(self, events: Sequence[Event]) -> TimedSection:
        memory = _Memory.of(events, self.kinds)
        program = _Items(self.each_operator)
        operators, exposed = defaultdict[str, float](float), defaultdict[str, float](float)
        program.add(Mark())
        for index, event in enumerate(events):
            if index == memory.fullest:
                program.add(Mark())
            if isinstance(event, Operator):
                seconds = self._seconds_of(event)
                operators[kind_of(event)] += seconds
                program.compute(seconds, event.name)
            elif isinstance(event, Communication) and takes_time(event):
                self._begin(event, program, exposed)
            elif isinstance(event, Waited):
                self._wait(event, program)
        if memory.fullest == len(events):
            program.add(Mark())
        return TimedSection(program.finished(), operators, exposed, memory.change, memory.most)

    def _begin(self, call: Communication, program: "_Items", exposed: defaultdict[str, float]) -> None:
        lane = self.lanes.of(self.member, call.kind, call.group, call.peer)
        if lane not in self._alone:
            program.add(Begin(lane, call.kind, call.bytes))
            return
        seconds = sum(self.prices.of(lane, call.kind, call.bytes))
        exposed[lane.group] += seconds
        program.compute(seconds, call.kind)

    def _wait(self, waited: Waited, program: "_Items") -> None:
        lane = self.lanes.of(self.member, waited.kind, waited.group, waited.peer)
        if lane not in self._alone:
            program.add(Wait(lane, waited.kind, waited.index))

    def _seconds_of(self, operator: Operator) -> float:
        if (seconds := self._seconds.get(id(operator))) is None:
            seconds = self._seconds[id(operator)] = self.seconds(operator)
        return seconds


class _Items:
    """Collects the items of a section; puts computations that follow each other together, unless they are wanted apart."""

    def __init__(self, apart: bool) -> None:
        self._items: list[Item] = []
        self._apart = apart
        self._seconds = 0.0

    def add(self, item: Item) -> None:
        if self._seconds:
            self._items.append(Compute(self._seconds))
            self._seconds = 0.0
        self._items.append(item)

    def compute(self, seconds: float, name: str) -> None:
        if self._apart:
            self._items.append(Compute(seconds, name))
        else:
            self._seconds += seconds

    def finished(self) -> tuple[Item, ...]:
        if self._seconds:
            self._items.append(Compute(self._seconds))
        return tuple(self._items)


@dataclass
class _Memory:
    """How a section changes what a role holds, in bytes by kind."""

    change: Counter[str]
    most: Counter[str]
    """At the first moment in the section when it holds most."""
    fullest: int
    """The number of events before that moment."""

    @staticmethod
    def of(events: Sequence[Event], kinds: Sequence[str]) -> "_Memory":
        total = most = fullest = 0
        for index, event in enumerate(events):
            if isinstance(event, Allocation | Free):
                total += changed_bytes(event)
                if total > most:
                    most, fullest = total, index + 1
        return _Memory(_by_kind(events, kinds), _by_kind(events[:fullest], kinds), fullest)


def _by_kind(events: Sequence[Event], kinds: Sequence[str]) -> Counter[str]:
    found = Counter[str]()
    for event in events:
        if isinstance(event, Allocation | Free):
            found[kinds[event.block]] += changed_bytes(event)
    return found


def kind_of(operator: Operator) -> str:
    """Returns the part of a step to which an operator belongs (step_parts.py)."""
    return OTHER_KERNELS if not operator.flops else ATTENTION if "attention" in operator.name else PRODUCTS

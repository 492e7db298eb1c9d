"""The clock of a described cluster: when the computations and communications of its ranks begin and end.

The rules are those of an accelerator with NCCL:

- A rank runs its operators one after the other on its computation stream.
- A lane is a communicator, which has a stream of its own. A group has one for its collectives, and one for its messages from each
  rank to each other. The calls of a lane run one after the other, in the order in which each of its ranks begins them.
- A call begins once all ranks of its lane have reached it and the lane's previous call has ended. So a message begins once the
  sender and the receiver have reached it, and ends on both at the same time.
- Computation goes on beside a call until the rank waits for it.
- Calls that transfer at the same time, in the same direction and over the same tier of links of a device share these links equally.
  What a call takes of the links of tiers within its own is not counted: it is at most what passes the slower links outside.
- On a CPU, the processors that compute also move the bytes. As long as a rank computes while a call of its own transfers, each of
  the two gets half of them.

A member of a lane may stand for many ranks that do the same.
"""

import heapq
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import count
from math import inf
from typing import NamedTuple, TypeAlias

from bagualu.comm.cost import collective_cost
from bagualu.comm.errors import CommunicationError
from bagualu.comm.topology import Cluster

MESSAGES = ("send", "receive")
COMPUTE = "compute"
"""The name of the computation stream; every other stream has the name of its lane."""


@dataclass(frozen=True, eq=False)
class Lane:
    """A communicator: the collectives of a group, or its messages from one rank to another."""

    group: str
    """The name of the group."""
    name: str
    """That of the group or, for messages, also source and destination."""
    members: tuple[int, ...]
    """Indices of the programs that take part; for messages the source and the destination."""
    ranks: range
    """The ranks of the communicator, of which it may have several alike; ascending."""


class Compute(NamedTuple):
    """The rank computes for so long."""

    seconds: float
    name: str = ""


class Begin(NamedTuple):
    """The rank begins a call."""

    lane: Lane
    kind: str
    """As of `Communication`."""
    bytes: int


@dataclass(frozen=True, slots=True)
class Wait:
    """The rank waits for a call: of those of this lane and kind for which it has not waited, that at `index`, the oldest first.
    Does nothing if there is no such call, which then began before the step."""

    lane: Lane
    kind: str
    index: int = 0


class Mark(NamedTuple):
    """A point in the program whose time is wanted."""


Item: TypeAlias = "Compute | Begin | Wait | Mark"
Price = tuple[float, float]
"""Seconds of a call that do not depend on its size, and seconds of its transfer if no other call uses the links."""


class StreamSpan(NamedTuple):
    """Something that a stream did from `start` to `end`, in seconds."""

    stream: str
    name: str
    start: float
    end: float
    call: int | None = None
    """The number of a call, the same on all its members; None for computation."""


class Prices:
    """What calls take on a cluster, each computed once."""

    def __init__(self, cluster: Cluster) -> None:
        self._cluster = cluster
        self._known: dict[tuple[range, str, int], Price] = {}
        self._tiers: dict[range, int] = {}

    def of(self, lane: Lane, kind: str, size_bytes: int) -> Price:
        """Returns what a call takes; a barrier is an empty all_reduce."""
        key = lane.ranks, kind, size_bytes
        if (price := self._known.get(key)) is None:
            collective = "p2p" if kind in MESSAGES else "all_reduce" if kind == "barrier" else kind
            cost = collective_cost(self._cluster, collective, size_bytes, lane.ranks)
            price = self._known[key] = cost.latency_seconds, cost.transfer_seconds
        return price

    def moved_by_processor(self, rank: int) -> bool:
        """Returns whether the processors of a rank move what it sends and receives."""
        return self._cluster.part_of(rank).chip.type == "cpu"

    def tier(self, lane: Lane) -> int:
        """Returns the index of the tier of links that joins all ranks of the lane."""
        if (tier := self._tiers.get(lane.ranks)) is None:
            tier = self._tiers[lane.ranks] = len(self._cluster.levels(lane.ranks)) - 1
        return tier


_Link = tuple[int, int, int]
"""The links of a tier (1) of a member (0), in the direction (2) out of it, 0, or into it, 1."""


@dataclass(eq=False, slots=True)
class _Call:
    """A call of a lane."""

    lane: Lane
    kind: str
    number: int
    bytes: int = 0
    arrived: int = 0
    last: int = -1
    """The member that reached it last."""
    reached: float = inf
    """When that was."""
    start: float = inf
    end: float = inf
    """Infinite until it has ended."""
    waiting: "list[StreamProgram]" = field(default_factory=list)
    links: tuple[_Link, ...] = ()
    remaining: float = 0.0
    """Seconds of transfer that were left at `since`, if no other call used the links."""
    since: float = 0.0
    rate: float = 0.0
    """The part of the links that it has; 0 while it does not transfer."""
    computed: dict[int, float] | None = None
    """For each member whose processors move the bytes, what it had computed when the transfer began; None if there are none."""


@dataclass(eq=False)
class StreamProgram:
    """What a member does, and what became of it."""

    index: int
    rank: int
    """A rank that it stands for."""
    items: Iterator[Item]
    time: float = 0.0
    """How far its computation stream is; at last, when it ended."""
    computed: float = 0.0
    """Seconds of computation until then."""
    marks: list[float] = field(default_factory=list)
    """The times of its `Mark`s."""
    exposed: dict[str, float] = field(default_factory=dict)
    """For each group, seconds in which the computation stream waited for a call that its members had reached."""
    held_up: dict[tuple[str, int], float] = field(default_factory=dict)
    """For each group and member, seconds in which the computation stream waited for a call which that member reached last."""
    spans: list[StreamSpan] = field(default_factory=list)
    pending: dict[tuple[Lane, str], list[_Call]] = field(default_factory=dict)
    blocked: _Call | None = None

    def computed_by(self, now: float) -> float:
        """Returns the seconds of computation until `now`, if no more of its time is taken."""
        return self.computed - max(0.0, self.time - now)

    def gives(self, seconds: float, group: str) -> None:
        """Delays the computation stream, because its processors move what a call of `group` sends."""
        self.exposed[group] = self.exposed.get(group, 0.0) + seconds
        self.time += seconds

    def waits_until(self, call: _Call) -> None:
        """Makes the computation stream wait for a call that has ended."""
        if call.end > self.time:
            reached = min(max(call.reached, self.time), call.end)
            group = call.lane.group
            if reached > self.time:
                who = group, call.last
                self.held_up[who] = self.held_up.get(who, 0.0) + (reached - self.time)
            self.exposed[group] = self.exposed.get(group, 0.0) + (call.end - reached)
            self.time = call.end


@dataclass(eq=False, slots=True)
class _Queue:
    """The calls of a lane that have not ended, in order."""

    counts: dict[int, int]
    """How many calls each member has begun."""
    calls: deque[_Call] = field(default_factory=deque)
    ended: int = 0


class Clock:
    """Runs programs, one for each member, beside each other. `records`: also writes their spans down."""

    def __init__(self, programs: Sequence[tuple[int, Iterable[Item]]], prices: Prices, records: bool = False) -> None:
        """`programs`: for each member, a rank that it stands for, and its items."""
        self.programs = [StreamProgram(index, rank, iter(items)) for index, (rank, items) in enumerate(programs)]
        self.end = 0.0
        """When all computations and calls have ended."""
        self.last_group = ""
        """The group of the call that ended last."""
        self._prices, self._records = prices, records
        self._moves = [prices.moved_by_processor(program.rank) for program in self.programs]
        self._now = 0.0
        self._order, self._numbers = count(), count()
        self._due: list[tuple[float, int, Callable[[], None]]] = []
        """What happens next: when, in which order at the same time, and what."""
        self._queues: dict[Lane, _Queue] = {}
        self._users: dict[_Link, list[_Call]] = {}
        """The calls that transfer over links now."""

    def run(self) -> None:
        """Runs all programs to their ends. Raises CommunicationError if ranks wait for each other forever or begin different
        calls."""
        for program in self.programs:
            self._go_on(program)
        while self._due:
            self._now, _, happens = heapq.heappop(self._due)
            happens()
        self._check_ended()
        self.end = max([self.end, *(program.time for program in self.programs)])

    def _at(self, time: float, happens: Callable[[], None]) -> None:
        heapq.heappush(self._due, (time, next(self._order), happens))

    def _go_on(self, program: StreamProgram) -> None:
        """Runs a program until it begins a call in the future, waits or ends."""
        for item in program.items:
            if isinstance(item, Compute):
                self._compute(program, item)
            elif isinstance(item, Begin):
                if program.time > self._now:
                    self._begin_later(program, item)
                    return
                self._begin(program, item)
            elif isinstance(item, Wait):
                if not self._wait(program, item):
                    return
            else:
                program.marks.append(program.time)

    def _compute(self, program: StreamProgram, item: Compute) -> None:
        start = program.time
        program.time += item.seconds
        program.computed += item.seconds
        if self._records:
            program.spans.append(StreamSpan(COMPUTE, item.name, start, program.time))

    def _begin_later(self, program: StreamProgram, item: Begin) -> None:
        def begin() -> None:
            if program.time > self._now:  # it was delayed meanwhile
                self._begin_later(program, item)
            else:
                self._begin(program, item)
                self._go_on(program)

        self._at(program.time, begin)

    def _begin(self, program: StreamProgram, item: Begin) -> None:
        lane = item.lane
        if (queue := self._queues.get(lane)) is None:
            queue = self._queues[lane] = _Queue(dict.fromkeys(lane.members, 0))
        position = queue.counts[program.index] - queue.ended
        queue.counts[program.index] += 1
        if position == len(queue.calls):
            queue.calls.append(_Call(lane, item.kind, next(self._numbers)))
        call = queue.calls[position]
        if call.kind != item.kind and item.kind not in MESSAGES:
            raise CommunicationError(f"rank {program.rank} calls {item.kind} as number {queue.counts[program.index]} in "
                                     f"{lane.name}, but rank {self.programs[call.last].rank} calls {call.kind}")  # fmt: skip
        call.bytes = max(call.bytes, item.bytes)
        call.arrived, call.last, call.reached = call.arrived + 1, program.index, self._now
        program.pending.setdefault((lane, item.kind), []).append(call)
        if position == 0:
            self._start(call)

    def _wait(self, program: StreamProgram, item: Wait) -> bool:
        """Returns whether the program can go on: not if the call has not ended."""
        pending = program.pending.get((item.lane, item.kind))
        if not pending or item.index >= len(pending):
            return True
        call = pending.pop(item.index)
        if call.end <= program.time:
            return True
        program.blocked = call
        call.waiting.append(program)
        return False

    def _start(self, call: _Call) -> None:
        """Starts the first call of a lane's queue if all members have reached it."""
        if call.arrived < len(call.lane.members):
            return
        call.start = self._now
        latency, call.remaining = self._prices.of(call.lane, call.kind, call.bytes)
        happens = self._transfer if call.remaining > 0 else self._end
        self._at(self._now + latency, lambda: happens(call))

    def _transfer(self, call: _Call) -> None:
        """Begins the part of a call that uses links."""
        tier, members = self._prices.tier(call.lane), call.lane.members
        if call.kind in MESSAGES:
            call.links = (members[0], tier, 0), (members[1], tier, 1)
        else:
            call.links = tuple((member, tier, direction) for member in members for direction in (0, 1))
        call.since = self._now
        if moving := [self.programs[member] for member in members if self._moves[member]]:
            call.computed = {program.index: program.computed_by(self._now) for program in moving}
        for link in call.links:
            self._users.setdefault(link, []).append(call)
        self._share(call)

    def _share(self, changed: _Call) -> None:
        """Divides the links of `changed`, which begins or ends, anew."""
        users = {id(call): call for link in changed.links for call in self._users[link]}
        for call in users.values():
            rate = 1.0 / max(len(self._users[link]) for link in call.links)
            if rate == call.rate:
                continue
            call.remaining -= (self._now - call.since) * call.rate
            call.since, call.rate = self._now, rate
            end = self._now + max(0.0, call.remaining) / rate
            self._at(end, lambda call=call, rate=rate, since=self._now: self._end_if_still(call, rate, since))  # type: ignore[misc]

    def _end_if_still(self, call: _Call, rate: float, since: float) -> None:
        """Ends a transfer, unless its part of the links has changed since this end was foreseen."""
        if call.rate != rate or call.since != since:
            return
        for link in call.links:
            self._users[link].remove(call)
        call.rate = 0.0
        self._share(call)
        if call.computed is None:
            self._end(call)
        else:
            self._at(self._now + self._taken(call, call.computed), lambda: self._end(call))

    def _taken(self, call: _Call, computed: dict[int, float]) -> float:
        """Takes the time of a transfer from the computation of members whose processors move the bytes, given what they had
        `computed` when it began. Returns the longest computation during the transfer, by which it takes longer."""
        longest = 0.0
        for member, before in computed.items():
            program = self.programs[member]
            overlap = max(0.0, program.computed_by(self._now) - before)
            program.gives(overlap, call.lane.group)
            longest = max(longest, overlap)
        return longest

    def _end(self, call: _Call) -> None:
        call.end = self._now
        self.end, self.last_group = call.end, call.lane.group
        queue = self._queues[call.lane]
        queue.calls.popleft()
        queue.ended += 1
        if self._records:
            for member in call.lane.members:
                kind = call.kind if call.kind not in MESSAGES else MESSAGES[member == call.lane.members[1]]
                self.programs[member].spans.append(StreamSpan(call.lane.name, kind, call.start, call.end, call.number))
        if queue.calls:
            self._start(queue.calls[0])
        for program in call.waiting:
            program.blocked = None
            program.waits_until(call)
            self._go_on(program)

    def _check_ended(self) -> None:
        """Raises CommunicationError if a call has not ended, or a program not reached its end."""
        stuck = [
            f"rank {program.rank} waits for {self._described(program.blocked)}" for program in self.programs if program.blocked
        ]
        if stuck:
            raise CommunicationError("deadlock, ranks wait for each other: " + "; ".join(stuck))
        for queue in self._queues.values():
            if queue.calls:
                raise CommunicationError(f"the step ends before {self._described(queue.calls[0])}")

    def _described(self, call: _Call) -> str:
        queue = self._queues[call.lane]
        number = queue.ended + queue.calls.index(call) + 1
        missing = [str(self.programs[member].rank) for member in call.lane.members if queue.counts[member] < number]
        several = f"ranks {', '.join(missing)} have" if len(missing) > 1 else f"rank {''.join(missing)} has"
        kind = "message" if call.kind in MESSAGES else call.kind
        return f"{kind} number {number} in {call.lane.name}" + (f", which {several} not begun" if missing else "")

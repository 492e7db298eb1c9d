"""Which roles take part in a call: the lanes (comm/clock.py) of the roles of a world."""

from collections.abc import Collection, Iterator, Sequence
from itertools import combinations, pairwise, product

from bagualu.comm.calls import Communication, Waited
from bagualu.comm.clock import MESSAGES, Lane, Prices
from bagualu.comm.topology import as_range
from bagualu.parallel.layout import Layout
from bagualu.parallel.simulation.events import Event, Operator, Role

_ALONG_PIPELINE = ("pipeline", "ends")
"""The groups of ranks that differ in their pipeline coordinate, besides world. All others lie at a single pipeline coordinate."""
_Key = tuple[int, str, int | None, int | None]
"""A member, the name of a group and, for a message, its source and destination."""


class Lanes:
    """The lanes of the roles of a world.

    A class is the roles of all pipeline coordinates whose ranks have the same coordinates on the fold axis. Messages stay within a
    class. A group of the fold joins the classes of its ranks; if several groups of an axis join some of them each, all classes that
    are connected by these groups wait for each other, as if they were one.
    """

    def __init__(self, roles: Sequence[Role], layout: Layout) -> None:
        """Raises ValueError unless `roles` list the pipeline coordinates of each class, one class after the other."""
        self._roles, self._layout = roles, layout
        depth = layout.pipeline
        if not roles or [role.pipeline for role in roles] != [*range(depth)] * (len(roles) // depth):
            raise ValueError(f"the roles must be those of pipeline coordinates 0 to {depth - 1} of each class, in order")
        self._classes = [range(first, first + depth) for first in range(0, len(roles), depth)]
        self._called = [_called(role) for role in roles]
        self._groups = [{(group, kind not in MESSAGES) for kind, group, _ in called} for called in self._called]
        self._joined: dict[str, list[int]] = {}
        self._lanes: dict[_Key, Lane] = {}
        self._made: dict[tuple[str, tuple[int, ...]], Lane] = {}

    def of(self, member: int, kind: str, group: str, peer: int | None) -> Lane:
        """Returns the lane of a call of a role; `peer` is the pipeline coordinate of the other end of a message."""
        own = self._roles[member].pipeline
        ends = (None, None) if kind not in MESSAGES else (own, peer) if kind == MESSAGES[0] else (peer, own)
        key = member, group, *ends
        if (lane := self._lanes.get(key)) is None:
            lane = self._lanes[key] = (
                self._message(member, group, *ends) if ends[0] is not None else self._collective(member, group)
            )
        return lane

    def alone(self, member: int, prices: Prices) -> set[Lane]:
        """Returns the lanes whose calls cannot overlap with anything else: this role is their only member, waits at once for each
        of their calls, and has no other calls over the same tier of links. On a CPU, whose processors do all, there are none."""
        if prices.moved_by_processor(self._rank(member)):
            return set()
        found: dict[Lane, bool] = {}
        for (kind, group, peer), waits_at_once in self._called[member].items():
            lane = self.of(member, kind, group, peer)
            found[lane] = found.get(lane, True) and waits_at_once and lane.members == (member,)
        shared = {prices.tier(lane) for lane, alone in found.items() if not alone}
        return {lane for lane, alone in found.items() if alone and prices.tier(lane) not in shared}

    def _message(self, member: int, group: str, source: int | None, destination: int | None) -> Lane:
        row = self._classes[member // self._layout.pipeline]
        assert source is not None
        if destination is None or not 0 <= destination < len(row) or source == destination:
            raise ValueError(f"a message of group {group} between pipeline coordinates {source} and {destination}")
        members = row[source], row[destination]
        name = f"{group} {source} -> {destination}"
        return self._lane(group, name, members, as_range(tuple(self._rank(one) for one in members)))

    def _collective(self, member: int, group: str) -> Lane:
        layout, row = self._layout, self._classes[member // self._layout.pipeline]
        if group == "world":
            return self._lane(group, group, tuple(range(len(self._roles))), range(layout.world))
        if group in _ALONG_PIPELINE:
            members = tuple(
                one for one in row if any(name == group and kind not in MESSAGES for kind, name, _ in self._called[one])
            )
            return self._lane(group, group, members, as_range(tuple(self._rank(one) for one in members)))
        pipeline = self._roles[member].pipeline
        classes = self._joined_classes(group)
        members = tuple(one[pipeline] for index, one in enumerate(self._classes) if classes[index] == classes[member // len(row)])
        return self._lane(group, group, members, as_range(layout.peers(group, self._rank(members[0]))))

    def _lane(self, group: str, name: str, members: tuple[int, ...], ranks: range) -> Lane:
        """Returns the lane with this name and these members, always the same."""
        key = name, members
        if key not in self._made:
            self._made[key] = Lane("pipeline" if group.startswith("pipeline") else group, name, members, ranks)
        return self._made[key]

    def _rank(self, member: int) -> int:
        return self._roles[member].trace.rank

    def _joined_classes(self, group: str) -> list[int]:
        """Returns, for each class, the first of the classes that the groups of this axis connect it with."""
        if group not in self._joined:
            first = list(range(len(self._classes)))
            if group == "fold":
                first = [0] * len(first)
            elif group != "tensor" and len(first) > 1:
                _connect(first, [self._roles[row[0]].coordinates for row in self._classes], group, self._layout)
            self._joined[group] = first
        return self._joined[group]


def _connect(first: list[int], coordinates: Sequence[Sequence[range]], axis: str, layout: Layout) -> None:
    """Gives those classes the same number in `first` whose `coordinates` on the fold lie in the same groups of `axis`. Classes of
    unknown coordinates are connected with all."""
    groups = [[_groups(axis, one, layout) for one in ranges or (range(layout.fold),)] for ranges in coordinates]
    for (one, ours), (other, theirs) in combinations(enumerate(groups), 2):
        if first[one] != first[other] and any(_meet(*pair) for pair in product(ours, theirs)):
            old, new = max(first[one], first[other]), min(first[one], first[other])
            first[:] = [new if number == old else number for number in first]


def _groups(axis: str, coordinates: range, layout: Layout) -> Collection[int]:
    """Returns the numbers of the groups of `axis`, an axis within the fold, in which these coordinates on the fold lie."""
    start, step = coordinates.start, coordinates.step
    match axis:
        case "replica" | "data":  # every so many-th coordinate, so the numbers repeat
            apart = layout.expert if axis == "replica" else layout.context
            return {(start + step * index) % apart for index in range(min(apart, len(coordinates)))}
        case "expert" | "context":  # so many neighbours
            together = layout.expert if axis == "expert" else layout.context
            return range(start // together, coordinates[-1] // together + 1, max(1, step // together))
    return range(1)


def _meet(first: Collection[int], second: Collection[int]) -> bool:
    few, many = sorted((first, second), key=len)
    return any(number in many for number in few)


def _called(role: Role) -> dict[tuple[str, str, int | None], bool]:
    """Returns the kind, group and peer of the calls of a role and, for each, whether it always waits at once."""
    found: dict[tuple[str, str, int | None], bool] = {}
    for events in {id(section.events): section.events for section in role.trace.sections}.values():
        for call, at_once in calls_in(events):
            key = call.kind, call.group, call.peer if call.kind in MESSAGES else None
            found[key] = found.get(key, True) and at_once
    return found


def calls_in(events: Sequence[Event]) -> Iterator[tuple[Communication, bool]]:
    """Yields the calls among `events` that take time, and whether the rank waits at once for each."""
    steps = [event for event in events if isinstance(event, Operator | Communication | Waited)]
    for event, following in pairwise([*steps, None]):
        if isinstance(event, Communication) and takes_time(event):
            yield event, isinstance(following, Waited)


def takes_time(call: Communication) -> bool:
    """Returns whether ranks wait for each other in a call: not for memory that no accelerator lends."""
    return call.kind != "lend"

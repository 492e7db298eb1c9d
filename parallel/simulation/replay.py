"""Replays the roles of a world on a described cluster: when each of them computes, communicates and waits in a step.

The rules of streams are those of comm/clock.py. Here a role, which stands for all ranks that do the same, becomes a program of that
clock; the times of its operators come from a callable, those of its calls from the cluster. What a section of a role takes is
computed once for each distinct section, since the sections of a composed trace share their events.
"""

from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

from bagualu.comm.clock import Clock, Item, Prices, StreamProgram, StreamSpan
from bagualu.comm.topology import Cluster
from bagualu.parallel.layout import Layout
from bagualu.parallel.simulation.chips import divided_by_chip
from bagualu.parallel.simulation.events import Operator, Role, Section
from bagualu.parallel.simulation.lanes import Lanes
from bagualu.parallel.simulation.stragglers import slowest_paces
from bagualu.parallel.simulation.timed import SectionTimer, TimedSection

OperatorSeconds = Callable[[int, Operator], float]
"""Returns the seconds that an operator takes on a rank, with the launch of its kernel."""


@dataclass(frozen=True)
class MemoryMoment:
    """What a role holds at a moment."""

    seconds: float
    """Since the step began."""
    bytes: int
    by_kind: Mapping[str, int]
    """By kind (parallel/memory_kinds.py)."""
    section: Section
    """What the role does then."""


@dataclass(frozen=True)
class ReplayedRole:
    """The step of a role: what its ranks do on average. Busy, exposed and waiting times add up to the time of the step."""

    role: Role
    step_seconds: float
    busy: Mapping[str, float]
    """Seconds in which it computes, by phase (the values of `Phase`)."""
    operators: Mapping[str, float]
    """The same by kind of operator (step_parts.py)."""
    exposed: Mapping[str, float]
    """Seconds in which it waits for communication, by the group's mesh axis. Messages of the pipeline are those of "pipeline"."""
    pipeline_seconds: float
    """Seconds in which it waits for other ranks of the pipeline: the bubble."""
    imbalance_seconds: float
    """Seconds in which it waits for ranks at its own pipeline coordinate that have more work."""
    pace: float
    """How many times as long as its mean rank its slowest rank computes (stragglers.py)."""
    peak: MemoryMoment
    """The first moment at which it holds most memory."""
    timed: Sequence[TimedSection]
    """What its sections take and hold, in order."""
    marks: Sequence[float]
    """For each section, when it begins and when it holds most memory, one after the other."""
    end_seconds: float
    """When its computation stream has ended."""
    spans: Sequence[StreamSpan]
    """What its streams did, if asked for, in the order of their ends. The spans of a call have the same number on all its roles."""

    @cached_property
    def busy_seconds(self) -> float:
        return sum(self.busy.values())

    @property
    def straggler_seconds(self) -> float:
        """Seconds in which its mean rank waits for its slowest."""
        return (self.pace - 1) * self.busy_seconds

    def passes(self) -> Iterator[tuple[Section, float, float]]:
        """Yields each section with its begin and end on the computation stream."""
        begins = self.marks[::2]
        yield from zip(self.role.trace.sections, begins, [*begins[1:], self.end_seconds], strict=True)

    def memory(self) -> Iterator[MemoryMoment]:
        """Yields, for each section, what is held when it begins and when it holds most."""
        held = Counter[str]()
        for index, (section, timed) in enumerate(zip(self.role.trace.sections, self.timed, strict=True)):
            for seconds, more in (
                (self.marks[2 * index], Counter[str]()),
                (self.marks[2 * index + 1], Counter(timed.most_by_kind)),
            ):
                by_kind = {kind: size for kind in {**held, **more} if (size := held[kind] + more[kind])}
                yield MemoryMoment(seconds, sum(by_kind.values()), by_kind, section)
            held.update(timed.change_by_kind)


@dataclass(frozen=True)
class Replayed:
    """A step of a world."""

    step_seconds: float
    roles: Sequence[ReplayedRole]
    """In the order of the roles that were given; those of ranks with different chips in parts."""

    @property
    def bubble(self) -> float:
        """The fraction of all ranks' time in which they wait for other ranks of their pipelines."""
        return self.mean(lambda role: role.pipeline_seconds) / self.step_seconds

    def exposed(self) -> dict[str, float]:
        """Returns the seconds in which a rank waits for communication, by mesh axis, on average over all ranks."""
        axes = sorted({axis for role in self.roles for axis in role.exposed})
        return {axis: self.mean(lambda role, axis=axis: role.exposed.get(axis, 0.0)) for axis in axes}  # type: ignore[misc]

    def mean(self, of: Callable[[ReplayedRole], float]) -> float:
        """Returns the mean over all ranks."""
        return sum(replayed.role.ranks * of(replayed) for replayed in self.roles) / sum(role.role.ranks for role in self.roles)


def replay(
    roles: Sequence[Role],
    layout: Layout,
    cluster: Cluster,
    operator_seconds: OperatorSeconds,
    spans: Literal["calls", "operators"] | None = None,
    deviation: float = 0.0,
    plain: bool = False,
) -> Replayed:
    """Returns the times of a step that all `roles` of a world begin together. Roles whose ranks have different chips are divided.

    `spans`: whether to keep those of calls and the stretches between them, or those of calls and operators; None: neither.
    `deviation`: the standard deviation of the times of ranks, as a fraction (stragglers.py). `plain`: walks over every event of
    every section instead of over what distinct sections take; slower, with the same result.

    Raises CommunicationError if the ranks wait for each other forever or begin different calls, ValueError if roles are missing or
    the cluster has too few devices.
    """
    roles = divided_by_chip(roles, layout, cluster)
    prices, lanes = Prices(cluster), Lanes(roles, layout)
    paces = slowest_paces([role.ranks for role in roles], deviation)
    timers = [
        SectionTimer(
            member=member,
            seconds=_paced(operator_seconds, role.trace.rank, pace),
            lanes=lanes,
            prices=prices,
            kinds=role.trace.kinds,
            each_call=plain or spans is not None,
            each_operator=plain or spans == "operators",
            again=plain,
        )
        for member, (role, pace) in enumerate(zip(roles, paces, strict=True))
    ]
    timed = [[timer.timed(section) for section in role.trace.sections] for timer, role in zip(timers, roles, strict=True)]
    programs = [(role.trace.rank, _items(sections)) for role, sections in zip(roles, timed, strict=True)]
    clock = Clock(programs, prices, records=spans is not None)
    clock.run()
    last = max(clock.programs, key=lambda program: program.time)
    rest = clock.end - last.time, clock.last_group

    def result(program: StreamProgram) -> ReplayedRole:
        role, sections = roles[program.index], timed[program.index]
        apart = {member: other.pipeline != role.pipeline for member, other in enumerate(roles)}
        late = {**program.held_up, ("", last.index): last.time - program.time}
        waiting = {far: sum(seconds for (_, who), seconds in late.items() if apart[who] is far) for far in (True, False)}
        busy, operators, exposed = _sums(role, sections, program.exposed, rest)
        pace = paces[program.index]
        return ReplayedRole(
            role=role,
            step_seconds=clock.end,
            busy={phase: seconds / pace for phase, seconds in busy.items()},
            operators={kind: seconds / pace for kind, seconds in operators.items()},
            exposed=exposed,
            pipeline_seconds=waiting[True],
            imbalance_seconds=waiting[False],
            pace=pace,
            peak=_peak(role, sections, program.marks),
            timed=sections,
            marks=program.marks,
            end_seconds=program.time,
            spans=program.spans,
        )

    return Replayed(clock.end, [result(program) for program in clock.programs])


def _paced(operator_seconds: OperatorSeconds, rank: int, pace: float) -> Callable[[Operator], float]:
    return lambda operator: pace * operator_seconds(rank, operator)


def _items(sections: Sequence[TimedSection]) -> Iterator[Item]:
    return (item for timed in sections for item in timed.items)


def _sums(
    role: Role, sections: Sequence[TimedSection], waited: Mapping[str, float], rest: tuple[float, str]
) -> tuple[dict[str, float], dict[str, float], dict[str, float]]:
    """Returns the seconds of computation by phase and by kind of operator, and those of exposed communication by group. `rest`:
    seconds, after the last computation of all ranks has ended, in which a call of this group goes on."""
    busy, operators, exposed = (defaultdict[str, float](float) for _ in range(3))
    for section, timed in zip(role.trace.sections, sections, strict=True):
        busy[section.phase] += timed.busy_seconds
    times = Counter(id(timed) for timed in sections)
    for timed in {id(timed): timed for timed in sections}.values():
        for total, part in ((operators, timed.operators), (exposed, timed.exposed)):
            for name, seconds in part.items():
                total[name] += times[id(timed)] * seconds
    seconds, group = rest
    exposed[group] += seconds
    for group, seconds in waited.items():
        exposed[group] += seconds
    return _positive(busy), _positive(operators), _positive(exposed)


def _positive(times: Mapping[str, float]) -> dict[str, float]:
    return {name: seconds for name, seconds in times.items() if seconds > 0}


def _peak(role: Role, sections: Sequence[TimedSection], marks: Sequence[float]) -> MemoryMoment:
    held = most = fullest = 0
    for index, timed in enumerate(sections):
        if held + timed.most_bytes > most:
            most, fullest = held + timed.most_bytes, index
        held += timed.change_bytes
    by_kind = Counter(sections[fullest].most_by_kind)
    for timed in sections[:fullest]:
        by_kind.update(timed.change_by_kind)
    return MemoryMoment(
        marks[2 * fullest + 1], most, {kind: size for kind, size in by_kind.items() if size}, role.trace.sections[fullest]
    )

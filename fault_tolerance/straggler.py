"""Finds ranks that are slower than ranks with the same work.

A rank's own time is the part of a step in which it does not wait for other ranks. In a synchronous run, every rank's step takes as
long as the slowest rank's, so only own times show which rank that is. A rank is compared with its peers, the ranks of its pipeline
stage with the same experts: another stage, or experts with more tokens, may simply have more work. A rank without peers is not
judged. Peers exchange the sums of their own times over a window of steps, and draw the same conclusion from the same values. The
other ranks hear only of slow ranks, so that no rank holds the times of the whole world.
"""

import math
import time
from bisect import bisect_left
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from statistics import median
from typing import Any

import torch

from bagualu.comm.agree import maxima
from bagualu.comm.group import Group
from bagualu.comm.objects import broadcast_json, collect_json
from bagualu.fault_tolerance.config import StragglerConfig

_WINDOWS, _SLOW = 5, 4
"""A rank is flagged if _SLOW of its last _WINDOWS windows were slow; an occasional long step makes only a single window slow."""
_QUIET = 3
"""A flagged rank is cleared after this many windows in a row in which it is clearly faster than the limit: less than half as far
above its peers as straggler.ratio, or by too little to matter."""
_MATTERS = 0.05
"""A rank is slow in a window only if its own time exceeds its peers' by more than this fraction of the window's time."""
_FEWEST_STEPS, _MOST_STEPS = 5, 1000
"""The least and greatest number of steps in a window."""


class WorkClock:
    """Observes a monitor and measures the rank's own time: from the beginning of a step to `lap`, except when it waits."""

    def __init__(self, now: Callable[[], float] = time.perf_counter, cpu: Callable[[], float] = time.process_time) -> None:
        self._now, self._cpu = now, cpu
        self._own = self._used = 0.0
        self._since: tuple[float, float] | None = None
        self._in_step = False

    def at(self, point: str, step: int) -> None:
        """See `Observer.at`."""
        if point == "data" and not self._in_step:
            self._in_step = True
            self._go()

    def waits(self, what: str | None) -> None:
        """See `Observer.waits`."""
        if what is not None:
            self._halt()
        elif self._in_step:
            self._go()

    def lap(self) -> tuple[float, float]:
        """Ends a step; returns (seconds of the rank's own work in it, processor seconds that the process used during that work)."""
        self._halt()
        own_and_cpu = self._own, self._used
        self._own = self._used = 0.0
        self._in_step = False
        return own_and_cpu

    def _go(self) -> None:
        self._since = self._now(), self._cpu()

    def _halt(self) -> None:
        if self._since is not None:
            self._own += self._now() - self._since[0]
            self._used += self._cpu() - self._since[1]
            self._since = None


@dataclass(frozen=True)
class Window:
    """A rank's times over the steps of a window, in seconds."""

    own: float
    """Time of the rank's own work."""
    cpu: float
    """Processor time used in `own`. If it is less than `own`, the process was stopped or shared its cores."""
    wall: float
    """Time of the whole window, including waiting."""


@dataclass
class Straggler:
    """A rank that is, or was, slower than its peers. Times and ratios are those of the last window in which it was slow, times per
    step."""

    rank: int
    since_step: int
    """The step after which the rank was flagged."""
    until_step: int | None = None
    """The step after which the rank was cleared; None if it is still flagged as slow."""
    ratio: float = 0.0
    """The rank's own seconds divided by the median of its peers' own seconds."""
    own_seconds: float = 0.0
    peer_seconds: float = 0.0
    cpu_share: float = 0.0
    """Processor seconds that the rank's process used per second of the rank's own work."""
    peer_cpu_share: float = 0.0

    def __str__(self) -> str:
        if self.until_step is not None:
            return f"rank {self.rank} keeps up with its peers again (it was slow from step {self.since_step} on)"
        return (f"rank {self.rank} is slow: {self.own_seconds:.3g} s of its own work a step, its peers "
                f"{self.peer_seconds:.3g} s ({self.ratio:.1f}x), on a processor {self.cpu_share:.0%} of that "
                f"time, its peers {self.peer_cpu_share:.0%}")  # fmt: skip


@dataclass
class Judge:
    """Decides from windows of times which of several ranks with the same work are slow. The result depends only on the sequence of
    windows. `ratio` is straggler.ratio."""

    ratio: float
    history: list[Straggler] = field(default_factory=list)
    """An object for every time that a rank was flagged, in that order; a rank that was flagged twice has two."""
    _slow: dict[int, deque[bool]] = field(default_factory=dict)
    _quiet: dict[int, int] = field(default_factory=dict)
    _flagged: dict[int, Straggler] = field(default_factory=dict)

    @property
    def flagged(self) -> list[Straggler]:
        """Those in `history` that are flagged now and not cleared."""
        return list(self._flagged.values())

    def add(self, step: int, steps: int, windows: Mapping[int, Window]) -> list[Straggler]:
        """Adds the times of every rank, by rank, over `steps` steps up to `step`; returns the ranks that become flagged or cleared,
        as objects in `history`."""
        if len(windows) < 2:
            return []
        ordered = sorted(window.own for window in windows.values())
        found = (self._judge(step, steps, rank, windows, ordered) for rank in windows)
        return [straggler for straggler in found if straggler is not None]

    def _judge(self, step: int, steps: int, rank: int, windows: Mapping[int, Window], ordered: list[float]) -> Straggler | None:
        """`ordered`: the own times of all windows, ascending."""
        own = windows[rank]
        typical = median_without(ordered, own.own)
        ratio = own.own / max(typical, 1e-9)
        matters = own.own - typical > _MATTERS * own.wall
        slow = self._slow.setdefault(rank, deque(maxlen=_WINDOWS))
        slow.append(ratio > self.ratio and matters)
        recovered = ratio < 1 + (self.ratio - 1) / 2 or not matters
        self._quiet[rank] = self._quiet.get(rank, 0) + 1 if recovered else 0
        current = self._flagged.get(rank)
        if current is not None and self._quiet[rank] >= _QUIET:
            current.until_step = step
            slow.clear()
            return self._flagged.pop(rank)
        if not slow or not slow[-1]:
            return None
        fresh = current is None and sum(slow) >= _SLOW
        if fresh:
            current = self._flagged[rank] = Straggler(rank, step)
            self.history.append(current)
        if current is not None:
            current.ratio, current.own_seconds, current.peer_seconds = ratio, own.own / steps, typical / steps
            current.cpu_share = _cpu_share(own)
            current.peer_cpu_share = median(_cpu_share(other) for peer, other in windows.items() if peer != rank)
        return current if fresh else None


def _cpu_share(window: Window) -> float:
    return window.cpu / max(window.own, 1e-9)


def median_without(ordered: Sequence[float], value: float) -> float:
    """Returns the median of `ordered`, which is sorted, without one element that equals `value`."""
    left_out, others = bisect_left(ordered, value), len(ordered) - 1
    middles = {(others - 1) // 2, others // 2}
    return sum(ordered[index + (index >= left_out)] for index in middles) / len(middles)


class Stragglers:
    """Measures this rank's work, exchanges it with the ranks that do the same work, and tells all of `world` which are slow."""

    def __init__(self, config: StragglerConfig, world: Group, along: Sequence[Group]) -> None:
        """`along`: groups that this rank is in; the ranks that do the same work are those that differ from it along these groups,
        in any of them. The first ranks of all groups together report."""
        self._config, self._world, self._along = config, world, [group for group in along if group.size > 1]
        self._judge = Judge(config.ratio)
        self._reports = all(group.rank == 0 for group in self._along)
        self._known: list[Straggler] = []
        """The history of all ranks."""
        self._judges = bool(config.ratio and self._along)
        self._clock = WorkClock()
        self._own = self._cpu = self._wall = 0.0
        self._steps, self._due, self._warm = 0, _FEWEST_STEPS, False
        if self._judges:
            world.monitor.observers.append(self._clock)

    def after_step(self, step: int, seconds: float) -> list[Straggler]:
        """Records that step `step` (from 1) took `seconds`. At the end of a window, this is collective and returns the ranks that
        become flagged or cleared, the same on every rank; otherwise, and after the first window, it returns []."""
        if not self._judges:
            return []
        own, cpu = self._clock.lap()
        self._own, self._cpu, self._wall, self._steps = self._own + own, self._cpu + cpu, self._wall + seconds, self._steps + 1
        if self._steps < self._due:
            return []
        windows, steps = self._exchange(), self._steps
        changed = self._judge.add(step, steps, windows) if self._warm else []
        wall, slow = maxima([self._wall, float(bool(changed or self._judge.flagged))], self._world)
        self._own = self._cpu = self._wall = 0.0
        self._steps = 0
        self._due = min(_MOST_STEPS, max(_FEWEST_STEPS, math.ceil(self._config.window_seconds / max(wall / steps, 1e-6))))
        self._warm = True  # the first window includes warming up; it only determines the length of the next
        return self._tell(step) if slow else []

    def now(self) -> list[dict[str, Any]]:
        """Returns the ranks that are flagged as slow now, with the fields of Straggler, as plain JSON."""
        return [asdict(straggler) for straggler in self._known if straggler.until_step is None]

    def ever(self) -> list[dict[str, Any]]:
        """Returns all ranks that were ever flagged as slow by this process, with the fields of Straggler, as plain JSON."""
        return [asdict(straggler) for straggler in self._known]

    def _exchange(self) -> dict[int, Window]:
        """Returns the times of this rank and of the ranks with the same work, by rank. Collective."""
        rows = torch.tensor([[self._world.rank, self._own, self._cpu, self._wall]], dtype=torch.float64, device=self._world.device)
        for group in self._along:
            gathered = rows.new_empty(group.size * len(rows), 4)
            group.all_gather(gathered, rows)
            rows = gathered
        return {int(rank): Window(*times) for rank, *times in self._world.read(rows)}

    def _tell(self, step: int) -> list[Straggler]:
        """Brings `_known` up to date on all ranks and returns those in it that changed at `step`. Collective."""
        own = [asdict(straggler) for straggler in self._judge.history] if self._reports else []
        collected = collect_json(own, self._world) or []
        told = broadcast_json([straggler for several in collected for straggler in several], self._world)
        self._known = sorted((Straggler(**fields) for fields in told), key=lambda straggler: straggler.since_step)
        return [straggler for straggler in self._known if step in (straggler.since_step, straggler.until_step)]

"""A node that is gone while others wait for it: seen by its agent's silence, long before a communication gives up.

A process that dies breaks its connections, and its peers know at once. While a generation connects there are no connections yet,
and a machine that loses power breaks none. Its agent misses its heartbeats, however slowly the workers of others start. An agent
alone may be held up too; then its workers go on, and so do those here.
"""

import time
from collections.abc import Callable, Mapping
from pathlib import Path

from bagualu.fault_tolerance.watchdog.heartbeat import HEARTBEATS, Beat, read, read_beats
from bagualu.fault_tolerance.watchdog.verdict import SPARE
from bagualu.launch.workers.rendezvous import SILENT_SECONDS, NodeRendezvous
from bagualu.trainer.process.failure import Failure


class LostNode:
    """Looks for one, on behalf of the workers of this machine."""

    def __init__(self, nodes: NodeRendezvous, scratch: Path, clock: Callable[[], float] = time.monotonic) -> None:
        self._nodes = nodes
        self._folder = scratch / HEARTBEATS
        self._clock = clock
        self._seen: list[tuple[int, int]] = []
        self._since = 0.0

    def look(self, pids: Mapping[int, int]) -> Failure | None:
        """The failure of a generation that waits for a node that is gone. `pids`: its workers here, by rank."""
        seen, now = [(pid, read_beats(self._folder, rank)) for rank, pid in pids.items()], self._clock()
        if seen != self._seen:
            self._seen, self._since = seen, now
        if now - self._since < SILENT_SECONDS or not (missing := self._nodes.missing()):
            return None
        beats = beats_of(self._folder, pids)
        if not all(map(_waits, beats.values())):
            return None
        step = max(beat.step if beat else 0 for beat in beats.values())
        return gone(missing, where(step), step)


def gone(missing: list[str], phase: str, step: int = 0) -> Failure:
    """The failure that nodes `missing` have brought about."""
    who = f"node {', '.join(missing)}" if missing else "a node"
    cause = f"{who} is gone: nothing was heard of its agent for {SILENT_SECONDS} s, while the others waited for it"
    return Failure(-1, phase, cause, time.time(), "peer", step)


def beats_of(folder: Path, pids: Mapping[int, int]) -> dict[int, Beat | None]:
    """The heartbeats of these processes, by rank; None for one that has none yet."""
    beats = {rank: read(folder, rank) for rank in pids}
    return {rank: beat if beat and beat.pid == pids[rank] else None for rank, beat in beats.items()}


def has_begun(folder: Path, rank: int, pid: int) -> bool:
    """Whether that process has begun a step, or has none to begin."""
    beat = read(folder, rank)
    if beat is None:
        return read_beats(folder, rank) > 0  # at this very moment it writes
    return beat.pid == pid and (beat.steps_begun > 0 or beat.point == SPARE)


def where(step: int) -> str:
    """The phase of a run whose newest step is `step`."""
    return f"step {step}" if step else "start"


def _waits(beat: Beat | None) -> bool:
    """Whether the rank waits for others: in a communication, or it starts, which may mean that it waits to be connected."""
    return beat is None or bool(beat.operation) or not beat.steps_begun

"""Detects a lost node by its agent's missing heartbeats, long before a collective times out.

When a process dies, its connections break and its peers notice immediately. That does not help while workers are still connecting,
nor when a machine loses power. In both cases the node's agent stops sending heartbeats. But an agent can also be
slow while its workers go on. So a node counts as lost only if the workers here also make no progress and all wait for other ranks.
"""

import time
from collections.abc import Callable, Mapping
from pathlib import Path

from bagualu.fault_tolerance.watchdog.heartbeat import HEARTBEATS, Beat, read, read_beats
from bagualu.fault_tolerance.watchdog.verdict import SPARE
from bagualu.launch.workers.elastic_private import NodeRendezvous
from bagualu.launch.workers.rendezvous import SILENT_SECONDS
from bagualu.trainer.process.failure import Failure


class LostNode:
    """Looks for a lost node that the workers of this machine are waiting for."""

    def __init__(self, nodes: NodeRendezvous, scratch: Path, clock: Callable[[], float] = time.monotonic) -> None:
        self._nodes = nodes
        self._folder = scratch / HEARTBEATS
        self._clock = clock
        self._seen: list[tuple[int, int]] = []
        self._since = 0.0

    def look(self, pids: Mapping[int, int]) -> Failure | None:
        """Returns a failure if the workers here all wait while a node's agent is silent, otherwise None.

        `pids` maps the global ranks of the workers of this machine to their process ids.
        """
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
    """Returns the failure of a run that lost the nodes with the addresses `missing`; []: the node is unknown."""
    who = f"node {', '.join(missing)}" if missing else "a node"
    cause = f"{who} is gone: its agent sent no heartbeat for {SILENT_SECONDS} s while the others waited for it"
    return Failure(-1, phase, cause, time.time(), "peer", step)


def beats_of(folder: Path, pids: Mapping[int, int]) -> dict[int, Beat | None]:
    """Returns the heartbeats of the processes `pids`, by rank; None for a process that has not written one yet."""
    beats = {rank: read(folder, rank) for rank in pids}
    return {rank: beat if beat and beat.pid == pids[rank] else None for rank, beat in beats.items()}


def has_begun(folder: Path, rank: int, pid: int) -> bool:
    """Returns whether process `pid`, which runs `rank`, has begun a step or is a spare worker, which never begins a step. True also
    while the heartbeat that shows this is being written."""
    beat = read(folder, rank)
    if beat is None:
        return read_beats(folder, rank) > 0  # unreadable because it is being written right now
    return beat.pid == pid and (beat.steps_begun > 0 or beat.point == SPARE)


def where(step: int) -> str:
    """Returns, for messages, where a run is: "step N" for the newest step N that it has begun, or "start" for 0."""
    return f"step {step}" if step else "start"


def _waits(beat: Beat | None) -> bool:
    """Returns whether the rank may be waiting for others: in a collective, or before its first step, when it may be connecting."""
    return beat is None or bool(beat.operation) or not beat.steps_begun

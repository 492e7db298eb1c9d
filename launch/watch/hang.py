"""Ends hung workers: connects the watchdog, which detects hangs, with the launcher, which owns the worker processes."""

import os
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from bagualu.fault_tolerance.run_directory import RunDirectory
from bagualu.fault_tolerance.watchdog import stacks
from bagualu.fault_tolerance.watchdog.heartbeat import HEARTBEATS, read
from bagualu.fault_tolerance.watchdog.links import LostLink, cut_off, lost_links
from bagualu.fault_tolerance.watchdog.report import write_report
from bagualu.fault_tolerance.watchdog.verdict import HangDiagnosis, Patience
from bagualu.fault_tolerance.watchdog.watch import Watchdog
from bagualu.launch.watch.watcher import Watcher
from bagualu.trainer.process.failure import Failure
from bagualu.trainer.recipe.config import Recipe

_BEFORE_TIMEOUT = 0.75
"""Fraction of comm.timeout_seconds. When a rank has waited this long, the rank that it waits for is judged by the short limit, even
in a phase that may take long, and a longer restart.hang_seconds is shortened to it. This is before the timeout, because a rank that
has timed out no longer shows which rank it waited for."""


class HangCheck(Watcher):
    """Detects that the workers of this machine hang, writes a report, ends the worker processes and names the rank at fault.

    Ranks that are threads cannot be ended. With restart.hang_seconds=0 it does nothing.
    """

    def __init__(self, recipe: Recipe, scratch: Path) -> None:
        config = recipe.restart
        self._folder = scratch / HEARTBEATS
        self._logs = RunDirectory(recipe.run.dir).logs
        last_chance = _BEFORE_TIMEOUT * recipe.comm.timeout_seconds
        self._patience = Patience(min(config.hang_seconds, last_chance), config.long_hang_seconds, last_chance)
        self._processes: dict[int, int] = {}
        self._watchdog: Watchdog | None = None

    def started(self, generation: int, pids: Mapping[int, int]) -> None:
        """Begin to watch a new generation of workers; see `Watcher.started`."""
        self._processes = dict(pids)
        if self._patience.hang_seconds:
            self._watchdog = Watchdog(self._folder, pids, self._patience)

    def look(self) -> Failure | None:
        """Returns a failure if a worker hangs (see `Watcher.look`), else None. The call is slow only if a worker hangs, because it
        then ends the workers and writes a report; after that it returns None until new workers start."""
        diagnosis = self._watchdog.look() if self._watchdog else None
        if self._watchdog is None or diagnosis is None:
            return None
        of_threads = self._stacks_of_threads()  # at once: those that wait may give up soon
        seen, links = self._watchdog.seen(), lost_links(self._processes) if of_threads is None else []
        self._watchdog = None  # this generation is over
        diagnosis = _with_links(diagnosis, links)
        shown = stacks.end_all(self._folder, self._processes) if of_threads is None else of_threads
        report = write_report(self._logs, diagnosis, seen, shown, links)
        rank = diagnosis.culprits[0] if diagnosis.culprits else -1
        step = seen[rank].step if rank >= 0 else max(beat.step for beat in seen.values())
        phase = f"step {step}" if step else "start"
        return Failure(rank, phase, f"the run stood still: {diagnosis.why}; report: {report}", time.time(), "hung", step)

    def _stacks_of_threads(self) -> dict[int, str] | None:
        """Returns the stacks of the ranks, by rank, if they are threads of this process, which cannot be ended; else None."""
        if set(self._processes.values()) != {os.getpid()}:
            return None
        beats = {rank: read(self._folder, rank) for rank in self._processes}
        return stacks.of_threads({rank: beat.thread for rank, beat in beats.items() if beat})


def _with_links(diagnosis: HangDiagnosis, links: list[LostLink]) -> HangDiagnosis:
    """Returns the diagnosis with the lost connections `links` added to its reason. If it names no culprit and exactly one rank is
    an end of every lost connection, that rank becomes the culprit."""
    if not links:
        return diagnosis
    shown = "; ".join(map(str, links[:2])) + (f"; and {len(links) - 2} more" if len(links) > 2 else "")
    why = f"{diagnosis.why}: {shown}"
    rank = cut_off(links)
    if diagnosis.culprits or rank is None:
        return replace(diagnosis, why=why)
    return replace(diagnosis, why=f"every connection of rank {rank} is dead: {why}", culprits=(rank,))

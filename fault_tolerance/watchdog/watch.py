"""Watches the ranks of a machine from the launcher's process."""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import psutil

from bagualu.fault_tolerance.watchdog.heartbeat import read, read_beats
from bagualu.fault_tolerance.watchdog.verdict import GONE, HangDiagnosis, Patience, Seen, judge


@dataclass
class _Pulse:
    """What the watchdog knew of a rank's heartbeat when it last looked."""

    beats: int = 0
    silent_seconds: float = 0.0
    cpu_seconds: float = 0.0
    """Seconds of processor time that the rank's process had used when the heartbeat stopped changing."""


class Watchdog:
    """Watches the workers of this machine from one start of the workers to the next. `look` may be called often; it acts at most
    every `interval` seconds.

    Silence is summed over the watchdog's own looks, not read from a clock. So time in which the launcher or the whole machine was
    stopped does not count.
    """

    def __init__(
        self, folder: Path, processes: Mapping[int, int], patience: Patience, clock: Callable[[], float] = time.monotonic
    ) -> None:
        """`folder` contains the heartbeats. `processes` maps the ranks on this machine to their process ids."""
        self.processes = dict(processes)
        self.interval = min(1.0, patience.hang_seconds / 10)
        """The least number of seconds between two looks."""
        self._folder = folder
        self._patience = patience
        self._clock = clock
        self._last = clock()
        self._pulses = {rank: _Pulse() for rank in processes}

    def look(self) -> HangDiagnosis | None:
        """Returns the diagnosis if the run makes no progress; None if the run may still go on or it is too early to look again."""
        now = self._clock()
        if now - self._last < self.interval:
            return None
        passed = min(now - self._last, 2 * self.interval)
        self._last = now
        for rank, pulse in self._pulses.items():
            self._update(rank, pulse, passed)
        if max(pulse.silent_seconds for pulse in self._pulses.values()) < self._patience.hang_seconds:
            return None
        return judge(self.seen(), self._patience)

    def seen(self) -> dict[int, Seen]:
        """Returns the present state of every rank on this machine, by rank."""
        return {rank: self._see(rank, pulse) for rank, pulse in self._pulses.items()}

    def _update(self, rank: int, pulse: _Pulse, passed: float) -> None:
        beats = read_beats(self._folder, rank)
        if beats != pulse.beats:
            pulse.beats, pulse.silent_seconds = beats, 0.0
            return
        if not pulse.silent_seconds:
            pulse.cpu_seconds = _process(self.processes[rank])[1]
        pulse.silent_seconds += passed

    def _see(self, rank: int, pulse: _Pulse) -> Seen:
        state, cpu = _process(self.processes[rank])
        used = max(0.0, cpu - pulse.cpu_seconds)
        beat = read(self._folder, rank)
        if beat is None or beat.pid != self.processes[rank]:  # none yet, or left by the previous generation
            return Seen(rank, silent_seconds=pulse.silent_seconds, cpu_seconds=used, process=state)
        return Seen(
            rank=rank, step=beat.step, steps_begun=beat.steps_begun, point=beat.point, operation=beat.operation, line=beat.line,
            number=beat.number, counts=beat.counts, silent_seconds=pulse.silent_seconds if beat.beats == pulse.beats else 0.0,
            waited_seconds=time.monotonic() - beat.since if beat.line else 0.0, cpu_seconds=used, process=state,
        )  # fmt: skip


def seen_now(folder: Path) -> dict[int, Seen]:
    """Returns, by rank, the state of every rank with a heartbeat in `folder` and a live process; `silent_seconds` is the age of its
    last record, and `cpu_seconds` is 0."""
    states = {}
    for path in folder.glob("rank-*.beat"):
        beat = read(folder, int(path.stem.removeprefix("rank-")))
        if beat is None or (state := _process(beat.pid)[0]) in GONE:
            continue
        states[beat.rank] = Seen(
            rank=beat.rank, step=beat.step, steps_begun=beat.steps_begun, point=beat.point, operation=beat.operation,
            line=beat.line, number=beat.number, counts=beat.counts, silent_seconds=time.monotonic() - beat.since, process=state,
        )  # fmt: skip
    return states


def _process(pid: int) -> tuple[str, float]:
    """Returns the state of a process and the processor seconds that it has used."""
    try:
        process = psutil.Process(pid)
        with process.oneshot():
            times = process.cpu_times()
            return process.status(), times.user + times.system
    except psutil.NoSuchProcess:
        return "gone", 0.0

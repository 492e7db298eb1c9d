"""Measures the times of this rank's passes, for balancing and for drawings of a run."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from bagualu.parallel.pipeline.schedules.schedule import Action


@dataclass(frozen=True)
class Timed:
    """A pass with its times, in seconds since `Stopwatch.begin`."""

    action: Action
    start: float
    end: float


class Stopwatch:
    """Measures times on the device. On an accelerator it uses events, so the host waits only when the times are read. On the meta
    device, which computes nothing, it measures the host's time."""

    def __init__(self, device: torch.device) -> None:
        self._accelerated = device.type not in ("cpu", "meta")
        self._begin = self._now()
        self.began = 0.0
        """The time of the last `begin`, in seconds of `time.perf_counter`; 0.0 before the first."""
        self._marks: list[tuple[Action, float | torch.Event, float | torch.Event]] = []

    def begin(self) -> None:
        """Starts a run: forgets earlier passes and sets the origin of the times."""
        self._marks = []
        self.began, self._begin = time.perf_counter(), self._now()

    @contextmanager
    def timing(self, action: Action) -> Iterator[None]:
        """Measures the time of `action`, which runs within this context."""
        start = self._now()
        yield
        self._marks.append((action, start, self._now()))

    def passes(self) -> list[Timed]:
        """Returns the passes since the last `begin`, in order, with their times. On an accelerator it waits for the last of
        them."""
        if self._marks and isinstance(self._marks[-1][2], torch.Event):
            self._marks[-1][2].synchronize()
        return [Timed(action, self._since_begin(start), self._since_begin(end)) for action, start, end in self._marks]

    def _now(self) -> float | torch.Event:
        if not self._accelerated:
            return time.perf_counter()
        event = torch.Event(enable_timing=True)
        event.record()
        return event

    def _since_begin(self, mark: float | torch.Event) -> float:
        if isinstance(mark, float):
            assert isinstance(self._begin, float)
            return mark - self._begin
        assert isinstance(self._begin, torch.Event)
        return self._begin.elapsed_time(mark) / 1000.0

"""What happened to a run and when: `ledger.jsonl` in its directory, written by rank 0 and by the launcher. Free of torch.

One JSON object a line, appended by one write. A line that a crash or a full disk cut short is passed over by readers.
"""

import json
import os
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from bagualu.fault_tolerance.lines import Lines

LEDGER = "ledger.jsonl"
"""Its name in a run directory."""


@dataclass(frozen=True)
class Moment:
    """A time, by two clocks."""

    wall: float
    """Seconds since the epoch."""
    monotonic: float
    """Seconds; never set back."""

    @staticmethod
    def now() -> "Moment":
        return Moment(time.time(), time.monotonic())


@dataclass(frozen=True)
class Event:
    """From `wall` on (seconds since the epoch) the run was doing something else.

    what        from then on
    launched    a launcher starts up
    started     the launcher starts workers
    joined      rank 0 is there and starts up
    train       rank 0 is in step `step` (from 1)
    start, validation, checkpoint    rank 0 is doing that
    discarded   as before; the result of `step` was thrown away
    failed      the launcher has seen that the run had failed, at about `since`, and waits to start it again
    ended       the run has stopped; `cause` says how: done, stopped or failed
    """

    what: str
    wall: float
    monotonic: float
    clock: str
    """What `monotonic` was read from: two readings can be compared when this is the same."""
    writer: str = ""
    """One start of rank 0, or one launcher. What an older one still writes after a newer has begun does not count."""
    step: int = 0
    since: float | None = None
    rank: int | None = None
    cause: str = ""


class Ledger:
    """Appends events. `writer` as in Event. Never raises: an event that finds no room waits for the next one."""

    def __init__(self, run_dir: Path, writer: str = "") -> None:
        self.path = run_dir / LEDGER
        self._writer = writer
        self._clock = clock()
        self._lines = Lines(self.path, shared=True)

    def add(
        self,
        what: str,
        step: int = 0,
        since: float | None = None,
        rank: int | None = None,
        cause: str = "",
        moment: Moment | None = None,
    ) -> None:
        """It happens now, or has at `moment`. The others as in Event."""
        when = moment or Moment.now()
        event = Event(what, when.wall, when.monotonic, self._clock, self._writer, step, since, rank, cause)
        fields = {name: value for name, value in asdict(event).items() if value not in ("", None)}
        self._lines.add(json.dumps(fields))

    def write(self) -> None:
        """Try again what found no room."""
        self._lines.write()

    def close(self) -> None:
        self._lines.close()


def read(run_dir: Path) -> list[Event]:
    """Every whole line; [] when there are none. In the order of the clock, where it is one: a line may have waited for room."""
    path = run_dir / LEDGER
    events = []
    for line in path.read_bytes().splitlines() if path.exists() else []:
        try:
            events.append(Event(**json.loads(line)))
        except (ValueError, TypeError):  # cut short
            continue
    if len({event.clock for event in events}) == 1:
        events.sort(key=lambda event: event.monotonic)
    return events


def clock() -> str:
    """Names this machine since it was started."""
    boot = Path("/proc/sys/kernel/random/boot_id")
    return boot.read_text().strip() if boot.exists() else f"process {os.getpid()}"

"""The history of a run: `ledger.jsonl` in its directory, written by rank 0 and by the launcher.

Each line is a JSON object, appended by a single write. Readers ignore lines that a crash or a full disk has cut short.
"""

import json
import os
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from bagualu.comm import jsonl
from bagualu.fault_tolerance.append_log import AppendLog
from bagualu.fault_tolerance.run_directory import RunDirectory


@dataclass(frozen=True)
class Moment:
    """A time on two clocks."""

    wall: float
    """Seconds since the epoch."""
    monotonic: float
    """Seconds on this machine's monotonic clock."""

    @staticmethod
    def now() -> "Moment":
        return Moment(time.time(), time.monotonic())


@dataclass(frozen=True)
class Event:
    """A change of what the run does, at `wall` (seconds since the epoch).

    what        meaning
    launched    a launcher starts
    started     the launcher starts workers
    joined      rank 0 has joined and starts with `engine`
    train       rank 0 trains in step `step` (from 1)
    start, validation, checkpoint, balance    rank 0 begins this activity
    discarded   the result of `step` was discarded
    saved       the checkpoint of `step` was committed, `seconds` after its save began; the activity does not change
    failed      the launcher has noticed that the run failed, at about `since`, and waits to restart it
    ended       the run has ended; `cause` is done, stopped or failed
    """

    what: str
    wall: float
    monotonic: float
    clock: str
    """Identifies the clock of `monotonic`; only times of events with the same `clock` can be compared."""
    writer: str = ""
    """Identifies a start of rank 0, or a launcher. Events that an older writer adds after a newer writer has begun are ignored
    (totals.py)."""
    step: int = 0
    since: float | None = None
    rank: int | None = None
    cause: str = ""
    seconds: float | None = None
    engine: str = ""
    """The engine and its ZeRO stage, e.g. "native, ZeRO-1"."""


class Ledger:
    """Appends events of `writer` (see Event) to the ledger. Storage errors raise nothing: an event for which there is no space is
    written later."""

    def __init__(self, run_dir: Path, writer: str = "") -> None:
        self.path = RunDirectory(run_dir).ledger
        self._writer = writer
        self._clock = clock()
        self._lines = AppendLog(self.path, shared=True)

    def add(
        self,
        what: str,
        step: int = 0,
        since: float | None = None,
        rank: int | None = None,
        cause: str = "",
        moment: Moment | None = None,
        seconds: float | None = None,
        engine: str = "",
    ) -> None:
        """Appends an event that happens now, or happened at `moment` if that is given. The other arguments are fields of Event."""
        when = moment or Moment.now()
        event = Event(what, when.wall, when.monotonic, self._clock, self._writer, step, since, rank, cause, seconds, engine)
        fields = {name: value for name, value in asdict(event).items() if value not in ("", None)}
        self._lines.add(json.dumps(fields))

    def write(self) -> None:
        """Tries again to write the events that did not fit on the disk."""
        self._lines.write()

    def close(self) -> None:
        self._lines.close()


def read(run_dir: Path) -> list[Event]:
    """Returns the events in the ledger of the run in directory `run_dir`, without repetitions; [] if there are none. Damaged lines
    are skipped.

    If all events have the same clock, they are sorted by `monotonic`, because a line may have been written late for lack of space.
    """
    events = list(dict.fromkeys(filter(None, map(_event, jsonl.read(RunDirectory(run_dir).ledger)))))
    if len({event.clock for event in events}) == 1:
        events.sort(key=lambda event: event.monotonic)
    return events


def _event(fields: dict[str, Any]) -> Event | None:
    """Returns the event of a line; None if the line is not a valid event."""
    try:
        event = Event(**fields)
    except TypeError:
        return None
    texts = all(type(text) is str for text in (event.what, event.clock, event.writer, event.cause, event.engine))
    numbers = jsonl.number(event.wall) and jsonl.number(event.monotonic) and type(event.step) is int
    optional = all(value is None or jsonl.number(value) for value in (event.since, event.seconds))
    optional = optional and (event.rank is None or type(event.rank) is int)
    return event if texts and numbers and optional else None


def clock() -> str:
    """Returns an identifier of this machine's monotonic clock, which changes when the machine boots."""
    boot = Path("/proc/sys/kernel/random/boot_id")
    return boot.read_text().strip() if boot.exists() else f"process {os.getpid()}"

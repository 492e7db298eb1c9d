"""A rank's heartbeat: a record of what the rank does, in memory that the launcher can read without the rank's help.

    FOLDER/rank-00003.beat      a record, then the count of every line    written in place, on the rank's own thread
    FOLDER/rank-00003.lines     the rank's identity, then a line of JSON for each line of operations, in the order of the counts

A rank that can no longer run Python stops writing, so its record no longer changes. Writing a record takes no lock, makes no system
call (except to add a line of operations) and never waits.
"""

import json
import mmap
import os
import struct
import threading
import time
from dataclasses import dataclass
from pathlib import Path

from bagualu.comm.monitor import Counts, Line, Monitor

HEARTBEATS = "heartbeats"
"""Name of the folder of heartbeats, in the scratch folder that the ranks of this machine share."""
_RECORD = struct.Struct("<QqQ16s16sqQdQ")
"""Fields: beats, step, steps begun, point, operation, line, number, monotonic seconds, beats. If the two beats differ, the record
was read while it was being written."""
_COUNTS_AT = 128
_LINES = 512
"""The number of lines of operations whose counts the file has room for at first."""


_PACK, _NOW = _RECORD.pack_into, time.monotonic


class _Encoded(dict[str, bytes]):
    """A cache of short texts as bytes; there are only a few different ones."""

    def __missing__(self, text: str) -> bytes:
        self[text] = text.encode()[:16]
        return self[text]


class Heartbeat:
    """Observes a rank's monitor and writes what the monitor reports to the rank's heartbeat. A call costs about a microsecond
    (tests/bench/heartbeat.py)."""

    def __init__(self, folder: Path, rank: int, monitor: Monitor) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._monitor = monitor
        self._path = folder / f"rank-{rank:05d}.beat"
        self._beats = self._step = self._steps_begun = self._described = 0
        self._encoded = _Encoded()
        self._point = self._encoded[monitor.point]
        who = {"rank": rank, "pid": os.getpid(), "thread": threading.get_ident(), "started": time.monotonic()}
        self._lines = self._path.with_suffix(".lines")
        self._lines.write_text(json.dumps(who) + "\n")
        self._path.unlink(missing_ok=True)  # not truncated, because a watchdog may still have the previous file open
        self._memory = self._room(_LINES)
        monitor.counts, monitor.grow_counts = self._keep(monitor.counts), self._grow
        self._write(b"", -1, 0)
        monitor.observers.append(self)

    def at(self, point: str, step: int) -> None:
        """See `Observer.at`."""
        if step != self._step:
            self._step, self._steps_begun = step, self._steps_begun + 1
        self._point = self._encoded[point]
        self._write(b"", -1, 0)

    def waits(self, what: str | None) -> None:
        """See `Observer.waits`."""
        waiting = self._monitor.waiting
        if waiting is None:
            self._write(b"", -1, 0)
        else:
            if self._described < len(self._monitor.lines):
                self._describe()
            operation, line, number = waiting
            self._write(self._encoded[operation], line, number)

    def _write(self, operation: bytes, line: int, number: int) -> None:
        self._beats = beats = self._beats + 1
        _PACK(self._memory, 0, beats, self._step, self._steps_begun, self._point, operation, line, number, _NOW(), beats)

    def _describe(self) -> None:
        new = self._monitor.lines[self._described :]
        with self._lines.open("a") as file:
            file.writelines(json.dumps({**vars(line), "ranks": list(line.ranks)}) + "\n" for line in new)
        self._described += len(new)

    def _grow(self, counts: Counts) -> Counts:
        self._memory = self._room(2 * len(counts))
        return self._keep(counts)

    def _room(self, lines: int) -> mmap.mmap:
        with self._path.open("a+b") as file:
            os.posix_fallocate(file.fileno(), 0, _COUNTS_AT + 8 * lines)  # fails now, instead of a SIGBUS when memory runs out
            return mmap.mmap(file.fileno(), 0)

    def _keep(self, counts: Counts) -> Counts:
        shared = memoryview(self._memory)[_COUNTS_AT:].cast("Q")
        for index, count in enumerate(counts):
            shared[index] = count
        return shared


@dataclass(frozen=True)
class Beat:
    """The content of a heartbeat when it was read."""

    rank: int
    pid: int
    thread: int
    started: float
    """Time at which the heartbeat was created, in seconds of the machine's monotonic clock."""
    beats: int
    """The number of records that the rank has written so far. If two readings have the same number, the rank has reported nothing
    in between."""
    step: int
    steps_begun: int
    """The number of steps that this process has begun."""
    point: str
    operation: str
    """Name of the operation that the rank waits for; empty if the rank does not wait."""
    line: Line | None
    number: int
    since: float
    """Time of the last record, in seconds of the machine's monotonic clock."""
    counts: dict[Line, int]


def read(folder: Path, rank: int) -> Beat | None:
    """Returns the heartbeat of `rank`; None if it does not exist yet, is incomplete, or is being written at this moment."""
    path = folder / f"rank-{rank:05d}.beat"
    try:
        raw = path.read_bytes()
        who, *described = path.with_suffix(".lines").read_text().splitlines()
        about = json.loads(who)
        lines = [Line(line["group"], tuple(line["ranks"]), line["messages"]) for line in map(json.loads, described)]
        beats, step, begun, point, operation, line_index, number, since, again = _RECORD.unpack_from(raw)
    except (OSError, ValueError, struct.error):
        return None
    if beats != again or line_index >= len(lines):
        return None
    numbers = memoryview(raw)[_COUNTS_AT:].cast("Q")
    return Beat(
        rank=about["rank"], pid=about["pid"], thread=about["thread"], started=about["started"],
        beats=beats, step=step, steps_begun=begun, point=_text(point), operation=_text(operation),
        line=lines[line_index] if line_index >= 0 else None, number=number, since=since,
        counts=dict(zip(lines, numbers, strict=False)),
    )  # fmt: skip


def read_beats(folder: Path, rank: int) -> int:
    """Returns only `Beat.beats` of the heartbeat of `rank`; 0 if the heartbeat cannot be read, e.g. because it does not exist
    yet."""
    try:
        with (folder / f"rank-{rank:05d}.beat").open("rb") as file:
            return int.from_bytes(file.read(8), "little")
    except OSError:
        return 0


def _text(raw: bytes) -> str:
    return raw.rstrip(b"\0").decode()

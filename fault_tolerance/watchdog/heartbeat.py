"""A rank's heartbeat: where it is, in memory that the launcher sees without the rank's help.

    FOLDER/rank-00003.beat      one record, then the count of every line      written in place, by whatever thread the rank runs on
    FOLDER/rank-00003.lines     who the rank is, then one line of JSON for each line of operations, in the order of the counts

A rank that cannot run Python any more stops writing; that the record stands still is the signal. Nothing here takes a lock, calls
the kernel (but to open a line) or waits. Free of torch.
"""

import json
import mmap
import os
import struct
import threading
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from bagualu.comm.monitor import Counts, Line, Monitor

HEARTBEATS = "heartbeats"
"""Folder of the scratch folder where the ranks of this machine show that they live."""
_RECORD = struct.Struct("<QqQ16s16sqQdQ")
"""beats, step, steps begun, point, operation, line, number, monotonic seconds, beats again: a torn record has two counts."""
_COUNTS_AT = 128
_LINES = 512
"""Counts there is room for at first."""


_PACK, _NOW = _RECORD.pack_into, time.monotonic


class _Words(dict[str, bytes]):
    """Words as bytes; there are only a few."""

    def __missing__(self, word: str) -> bytes:
        self[word] = word.encode()[:16]
        return self[word]


class Heartbeat:
    """Observes one rank's monitor and writes down what it sees. Calls cost about a microsecond (tests/bench/heartbeat.py)."""

    def __init__(self, folder: Path, rank: int, monitor: Monitor) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._monitor = monitor
        self._path = folder / f"rank-{rank:05d}.beat"
        self._beats = self._step = self._steps_begun = self._described = 0
        self._words = _Words()
        self._point = self._words[monitor.point]
        who = {"rank": rank, "pid": os.getpid(), "thread": threading.get_ident(), "started": time.monotonic()}
        self._lines = self._path.with_suffix(".lines")
        self._lines.write_text(json.dumps(who) + "\n")
        self._path.unlink(missing_ok=True)  # not truncated: somebody may still look at the one before
        self._memory = self._room(_LINES)
        monitor.counts, monitor.grow_counts = self._keep(monitor.counts), self._longer
        self._write(b"", -1, 0)
        monitor.observers.append(self)

    def at(self, point: str, step: int) -> None:
        """As `Observer.at`."""
        if step != self._step:
            self._step, self._steps_begun = step, self._steps_begun + 1
        self._point = self._words[point]
        self._write(b"", -1, 0)

    def waits(self, what: str | None) -> None:
        """As `Observer.waits`."""
        waiting = self._monitor.waiting
        if waiting is None:
            self._write(b"", -1, 0)
        else:
            if self._described < len(self._monitor.lines):
                self._describe()
            operation, line, number = waiting
            self._write(self._words[operation], line, number)

    def _write(self, operation: bytes, line: int, number: int) -> None:
        self._beats = beats = self._beats + 1
        _PACK(self._memory, 0, beats, self._step, self._steps_begun, self._point, operation, line, number, _NOW(), beats)

    def _describe(self) -> None:
        new = self._monitor.lines[self._described :]
        with self._lines.open("a") as file:
            file.writelines(json.dumps(asdict(line)) + "\n" for line in new)
        self._described += len(new)

    def _longer(self, counts: Counts) -> Counts:
        self._memory = self._room(2 * len(counts))
        return self._keep(counts)

    def _room(self, lines: int) -> mmap.mmap:
        with self._path.open("a+b") as file:
            os.posix_fallocate(file.fileno(), 0, _COUNTS_AT + 8 * lines)  # an error now, not a SIGBUS when memory runs out later
            return mmap.mmap(file.fileno(), 0)

    def _keep(self, counts: Counts) -> Counts:
        shared = memoryview(self._memory)[_COUNTS_AT:].cast("Q")
        for index, count in enumerate(counts):
            shared[index] = count
        return shared


@dataclass(frozen=True)
class Beat:
    """What a heartbeat says, as it was read."""

    rank: int
    pid: int
    thread: int
    started: float
    """When the rank began to write, in seconds of the machine's monotonic clock."""
    beats: int
    """Changes; the same number again means that nothing has happened."""
    step: int
    steps_begun: int
    """Steps begun by this process."""
    point: str
    operation: str
    """What it waits for; empty when it waits for nobody."""
    line: Line | None
    number: int
    since: float
    """When that began, as `started`."""
    counts: dict[Line, int]


def read(folder: Path, rank: int) -> Beat | None:
    """The heartbeat of `rank`; None where there is none yet, or one that is being written this very moment."""
    path = folder / f"rank-{rank:05d}.beat"
    try:
        raw = path.read_bytes()
        who, *described = path.with_suffix(".lines").read_text().splitlines()
        about = json.loads(who)
        lines = [Line(one["group"], tuple(one["ranks"]), one["messages"]) for one in map(json.loads, described)]
        beats, step, begun, point, operation, line, number, since, again = _RECORD.unpack_from(raw)
    except (OSError, ValueError, struct.error):
        return None
    if beats != again or line >= len(lines):
        return None
    numbers = memoryview(raw)[_COUNTS_AT:].cast("Q")
    return Beat(
        rank=about["rank"], pid=about["pid"], thread=about["thread"], started=about["started"],
        beats=beats, step=step, steps_begun=begun, point=_text(point), operation=_text(operation),
        line=lines[line] if line >= 0 else None, number=number, since=since,
        counts=dict(zip(lines, numbers, strict=False)),
    )  # fmt: skip


def read_beats(folder: Path, rank: int) -> int:
    """How many changes the heartbeat of `rank` has seen: all that is needed while it moves. 0: there is none yet."""
    try:
        with (folder / f"rank-{rank:05d}.beat").open("rb") as file:
            return int.from_bytes(file.read(8), "little")
    except OSError:
        return 0


def _text(word: bytes) -> str:
    return word.rstrip(b"\0").decode()

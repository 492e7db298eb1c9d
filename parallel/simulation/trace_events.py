"""Writes a replayed step as a trace file that https://ui.perfetto.dev and chrome://tracing open.

The format is Chrome's Trace Event Format: a process for each role, a thread for each of its streams, an arrow from the sender of a
message to its receiver, and a counter of the memory that tensors take. Times are microseconds.
https://docs.google.com/document/d/1CvAClvFfyA5R-PhYUmn5OOQtYMH4h6I0nSsKchNAySU
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypeAlias

from bagualu.comm.clock import COMPUTE, MESSAGES, StreamSpan
from bagualu.parallel.simulation.replay import Replayed, ReplayedRole

TraceEvent: TypeAlias = dict[str, Any]


def write_trace(replayed: Replayed, path: Path) -> None:
    """Writes the streams of all roles of `replayed`, which has their spans. Raises OSError."""
    with path.open("w", encoding="utf-8") as file:
        file.write('{"displayTimeUnit": "ms", "traceEvents": [\n')
        for index, event in enumerate(trace_events(replayed)):
            file.write((",\n" if index else "") + json.dumps(event, separators=(",", ":")))
        file.write("\n]}\n")


def trace_events(replayed: Replayed) -> Iterator[TraceEvent]:
    """Yields the events of a trace file."""
    for process, role in enumerate(replayed.roles):
        yield from _of_role(process, role)


def _of_role(process: int, replayed: ReplayedRole) -> Iterator[TraceEvent]:
    yield _named("process_name", process, 0, role_name(replayed))
    yield {"ph": "M", "name": "process_sort_index", "pid": process, "args": {"sort_index": process}}
    threads = {COMPUTE: 0}
    for span in replayed.spans:
        threads.setdefault(span.stream, len(threads))
    for stream, thread in threads.items():
        yield _named("thread_name", process, thread, "computation" if stream == COMPUTE else stream)
    for section, begin, end in replayed.passes():
        if end > begin:
            yield _slice(str(section.action or section.phase), process, 0, begin, end)
    for span in replayed.spans:
        yield from _of_span(span, process, threads[span.stream])
    for moment in replayed.memory():
        by_kind = {kind: size for kind, size in moment.by_kind.items() if size > 0}
        yield {"ph": "C", "name": "memory of tensors, bytes", "pid": process, "ts": _microseconds(moment.seconds), "args": by_kind}


def _of_span(span: StreamSpan, process: int, thread: int) -> Iterator[TraceEvent]:
    yield _slice(span.name or "computes", process, thread, span.start, span.end)
    if span.call is not None and span.name in MESSAGES:
        sends = span.name == MESSAGES[0]
        arrow = {"ph": "s"} if sends else {"ph": "f", "bp": "e"}
        yield {**arrow, "name": "message", "cat": "message", "id": span.call, "pid": process, "tid": thread,
               "ts": _microseconds(span.start if sends else span.end)}  # fmt: skip


def _slice(name: str, process: int, thread: int, begin: float, end: float) -> TraceEvent:
    start = _microseconds(begin)
    return {"ph": "X", "name": name, "pid": process, "tid": thread, "ts": start, "dur": round(_microseconds(end) - start, 3)}


def _named(what: str, process: int, thread: int, name: str) -> TraceEvent:
    return {"ph": "M", "name": what, "pid": process, "tid": thread, "args": {"name": name}}


def _microseconds(seconds: float) -> float:
    return round(seconds * 1e6, 3)


def role_name(replayed: ReplayedRole) -> str:
    """Returns what the ranks of a role have in common, for people."""
    role = replayed.role
    ranks = f"rank {role.trace.rank}" + (f" and {role.ranks - 1:,} alike" if role.ranks > 1 else "")
    return f"pipeline {role.pipeline}: {ranks}"

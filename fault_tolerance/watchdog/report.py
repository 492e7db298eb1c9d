"""Writes a report of a hang as a text file in the run's logs."""

import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from bagualu.fault_tolerance.watchdog.links import LostLink
from bagualu.fault_tolerance.watchdog.verdict import HangDiagnosis, Seen


def write_report(
    folder: Path, verdict: HangDiagnosis, seen: Mapping[int, Seen], stacks: Mapping[int, str], links: Sequence[LostLink]
) -> Path:
    """Writes a report of the hang to `folder`, in a file with an unused name, and returns its path. `seen` and `stacks` are by
    rank."""
    folder.mkdir(parents=True, exist_ok=True)
    first = folder / f"hang-{time.strftime('%Y%m%d-%H%M%S')}.txt"
    path, number = first, 1
    while path.exists():
        number += 1
        path = first.with_stem(f"{first.stem}-{number}")
    path.write_text(_text(verdict, seen, stacks, links), encoding="utf-8")
    return path


def _text(verdict: HangDiagnosis, seen: Mapping[int, Seen], stacks: Mapping[int, str], links: Sequence[LostLink]) -> str:
    culprits = ", ".join(map(str, verdict.culprits))
    named = f"culprit: rank {culprits}" if culprits else "culprit: cannot be determined from this node"
    parts = [f"the run stood still, noticed {time.strftime('%Y-%m-%d %H:%M:%S %z')}", named, verdict.why, "", "ranks"]
    parts += [f"  rank {rank}: {state.doing()}" for rank, state in sorted(seen.items())]
    if links:
        parts += ["", "connections with data that are not acknowledged", *(f"  {link}" for link in links)]
    order = [*verdict.culprits, *(rank for rank in sorted(seen) if rank not in verdict.culprits)]
    for rank in order:
        stack = stacks.get(rank, "none: the process did not write it").rstrip()
        parts += ["", f"stack of rank {rank}", *(f"  {line}" for line in stack.splitlines())]
    return "\n".join(parts) + "\n"

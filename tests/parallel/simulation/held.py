"""What a rank holds, from one event of its trace to the next: to compare with the replay, which adds up whole sections."""

from collections import Counter
from typing import NamedTuple

from bagualu.parallel.simulation.events import Allocation, Free, RankTrace, Section, changed_bytes


class Peak(NamedTuple):
    """The most memory that a rank holds at once."""

    bytes: int
    by_kind: dict[str, int]
    section: Section


def peak(trace: RankTrace) -> Peak:
    """Returns the first moment at which the rank holds most."""
    held, most = Counter[str](), Peak(0, {}, trace.sections[0])
    for section, event in trace.events():
        if isinstance(event, Allocation | Free):
            held[trace.kinds[event.block]] += changed_bytes(event)
            if held.total() > most.bytes:
                most = Peak(held.total(), {kind: size for kind, size in held.items() if size}, section)
    return most

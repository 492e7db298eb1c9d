"""Divides roles whose ranks are on different chips of a mixed cluster."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import pairwise

from bagualu.comm.topology import Cluster
from bagualu.parallel.layout import Layout
from bagualu.parallel.simulation.events import Role


def divided_by_chip(roles: Sequence[Role], layout: Layout, cluster: Cluster) -> list[Role]:
    """Returns roles each of whose ranks have the same chip. All roles with the same coordinates on the fold are divided alike, so
    that messages stay between roles with the same coordinates. A tensor group on two chips counts to that of its first rank."""
    cuts = sorted({0, layout.fold, *_cuts(layout, cluster)})
    if len(cuts) == 2:
        return list(roles)
    depth = layout.pipeline
    classes = [roles[first : first + depth] for first in range(0, len(roles), depth)]
    return [
        _part(role, layout, coordinates)
        for members in classes
        for begin, end in pairwise(cuts)
        if (coordinates := tuple(_between(members[0].coordinates or (range(layout.fold),), begin, end)))
        for role in members
    ]


def _cuts(layout: Layout, cluster: Cluster) -> Iterator[int]:
    """Yields the coordinates on the fold at which, at some coordinate of the pipeline, another part of the cluster begins."""
    first = 0
    for part in cluster.parts[:-1]:
        first += part.devices or 0
        yield -(-first // layout.tensor) % layout.fold


def _between(ranges: Sequence[range], begin: int, end: int) -> Iterator[range]:
    for one in ranges:
        low, high = (min(len(one), max(0, -(-(edge - one.start) // one.step))) for edge in (begin, end))
        if low < high:
            yield one[low:high]


def _part(role: Role, layout: Layout, coordinates: tuple[range, ...]) -> Role:
    """Returns the role of those of its ranks that have these coordinates on the fold."""
    rank = layout.rank(role.pipeline, coordinates[0][0], 0)
    count = sum(map(len, coordinates))
    return replace(role, trace=replace(role.trace, rank=rank), ranks=count * layout.tensor, coordinates=coordinates)

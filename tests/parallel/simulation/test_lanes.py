"""The roles that a group of the fold joins."""

import random

import pytest

from bagualu.comm.calls import Communication, Waited
from bagualu.parallel.layout import Layout
from bagualu.parallel.simulation.events import RankTrace, Role, Section
from bagualu.parallel.simulation.lanes import Lanes

AXES = ("expert", "replica", "fold", "world")


def group_of(axis: str, fold: int, layout: Layout) -> int:
    return {"expert": fold // layout.expert, "replica": fold % layout.expert}.get(axis, 0)


def connected(classes: list[set[int]], axis: str, layout: Layout) -> list[set[int]]:
    """The classes that groups of `axis` connect, rank by rank."""
    joined = [{index} for index in range(len(classes))]
    for one in range(layout.fold):
        for other in range(layout.fold):
            if group_of(axis, one, layout) == group_of(axis, other, layout):
                first, second = (next(i for i, ranks in enumerate(classes) if at in ranks) for at in (one, other))
                together = joined[first] | joined[second]
                joined = [together if index in together else held for index, held in enumerate(joined)]
    return joined


@pytest.mark.parametrize("seed", range(12))
def test_groups_join_the_classes_of_their_ranks(seed: int) -> None:
    """Classes of ranks whose experts have as many rows, or of data ranks with as many micro-batches."""
    generator = random.Random(seed)
    data = generator.choice([2, 4, 6, 8])
    layout = Layout(data=data, expert=generator.choice([degree for degree in range(1, data + 1) if data % degree == 0]))
    step = layout.expert if seed % 2 else data
    chosen = [generator.randrange(3) for _ in range(step)]
    ranges = [[range(at, data, step) for at in range(step) if chosen[at] == number] for number in sorted(set(chosen))]
    events = [event for axis in AXES for event in (Communication("barrier", axis, 2, 0), Waited("barrier", axis))]
    sections: list[Section] = [Section("forward", None, [*events])]
    roles = [Role(RankTrace(own[0][0], sections, []), sum(map(len, own)), 0, 1, tuple(own)) for own in ranges]
    lanes, classes = Lanes(roles, layout), [{at for one in own for at in one} for own in ranges]
    for axis in AXES:
        for member, wanted in enumerate(connected(classes, axis, layout)):
            assert set(lanes.of(member, "barrier", axis, None).members) == wanted

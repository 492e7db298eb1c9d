"""The interleaved 1F1B schedule, for ranks with several stages each.

2 ranks of 2 stages each, 4 micro-batches:

    F0  F1  F0' F1' F2  B0' F3  B1' F2' B0  F3' B1  .   B2' .   B3' B2  B3
        F0  F1  F0' B0' F1' B1' F2  B0  F3  B1  F2' B2' F3' B3' B2  B3
"""

from itertools import pairwise

from bagualu.parallel.layout import StagePlacement
from bagualu.parallel.pipeline.schedules.formula import Formula
from bagualu.parallel.pipeline.schedules.schedule import Action, Kind


def interleaved_1f1b(placement: StagePlacement, micro_batches: int) -> list[list[Action]]:
    """Returns the passes of each rank. Groups of micro-batches go through one chunk after the other. As in 1f1b, each rank starts
    with forward passes and then alternates between forward and backward passes (Narayanan et al., arXiv 2104.04473, section 2.2).

    In the paper, groups have p micro-batches and m is a multiple of p. Here m is arbitrary: groups have at least p micro-batches
    (all m if m is less) and are as equal as possible, with the larger ones first, which preserves the bubble.

    The bubble is (p-1)(F+B) in passes of a stage, a fraction (p-1)/(vm+p-1) of the time (section 2.2). With fewer micro-batches
    than ranks, every further chunk waits p-m passes more until the group returns to its rank: (p-1 + (v-1)(p-m))(F+B). If g is the
    size of the first group, rank i holds (v-1)g + 2(p-1-i) + 1 activations of a stage, or vm if that is less. For groups of p, rank
    0 thus holds as much as p + (p-1)/v activations of all its stages together.
    """
    ranks, chunks = placement.ranks, placement.chunks
    groups = _groups(ranks, micro_batches)
    actions = []
    for rank in range(ranks):
        stages = placement.stages_of(rank)
        forward = [Action(Kind.FORWARD, m, stage) for group in groups for stage in stages for m in group]
        backward = [Action(Kind.BACKWARD, m, stage) for group in groups for stage in reversed(stages) for m in group]
        first = min(len(forward), (chunks - 1) * len(groups[0]) + 2 * (ranks - 1 - rank))
        mine = forward[:first]
        for pair in zip(forward[first:], backward, strict=False):
            mine += pair
        actions.append(mine + backward[len(forward) - first :])
    return actions


def _groups(ranks: int, micro_batches: int) -> list[range]:
    count = max(1, micro_batches // ranks)
    size, larger = divmod(micro_batches, count)
    starts = [group * size + min(group, larger) for group in range(count + 1)]
    return [range(start, end) for start, end in pairwise(starts)]


INTERLEAVED_1F1B = Formula(
    "(p-1)(F+B), for m < p (p-1 + (v-1)(p-m))(F+B)",
    lambda size: (size.ranks - 1 + (size.chunks - 1) * max(0, size.ranks - size.micro_batches)) * (size.forward + size.backward),
    "(v-1)g + 2p-1 with g = ceil(m / floor(m/p))",
    lambda size: min(
        size.chunks * size.micro_batches,
        (size.chunks - 1) * len(_groups(size.ranks, size.micro_batches)[0]) + 2 * size.ranks - 1,
    ),
)  # fmt: skip

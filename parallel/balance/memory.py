"""What a schedule holds in memory at its worst moments, exactly, for stages of any size. Free of torch.

A micro-batch's activations at a stage are held from its forward pass to its backward pass. Where the backward pass has two parts,
they are held to the first part, and the operands of the weights' products from there to the second.
"""

from bagualu.parallel.pipeline.schedule import Action, Kind, Schedule

Moment = tuple[tuple[int, int], ...]
"""For each stage of a rank in order: the micro-batches whose activations are held, and those whose operands are."""


def worst_moments(schedule: Schedule) -> list[list[Moment]]:
    """By rank: the moments of which no other holds at least as much of everything. Whatever a micro-batch holds at each stage, the
    peak is at one of them."""
    placement = schedule.placement
    return [_worst(actions, placement.stages_of(rank)) for rank, actions in enumerate(schedule.actions)]


def _worst(actions: list[Action], stages: list[int]) -> list[Moment]:
    held = {stage: [0, 0] for stage in stages}
    moments: set[Moment] = set()
    for action in actions:
        change = _CHANGES.get(action.kind)
        if change:
            held[action.stage][0] += change[0]
            held[action.stage][1] += change[1]
            moments.add(tuple((activations, operands) for activations, operands in held.values()))
    return [one for one in sorted(moments, reverse=True) if not any(_covers(other, one) for other in moments)]


_CHANGES = {Kind.FORWARD: (1, 0), Kind.BACKWARD: (-1, 0), Kind.INPUT_GRADIENT: (-1, 1), Kind.WEIGHT_GRADIENT: (0, -1)}


def _covers(other: Moment, one: Moment) -> bool:
    return other != one and all(a >= c and b >= d for (a, b), (c, d) in zip(other, one, strict=True))

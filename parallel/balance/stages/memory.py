"""Finds the moments at which a schedule needs most memory, for stages of any size.

A micro-batch's activations at a stage are held from its forward pass to its backward pass. If the backward pass is split, they are
held until I (the input gradient), and the operands of the weight gradients from I to W (the weight gradient).
"""

from bagualu.parallel.pipeline.schedules.schedule import Action, Kind, Schedule

Moment = tuple[tuple[int, int], ...]
"""For each stage of a rank, in order, two numbers of micro-batches: those whose activations, and those whose operands of the weight
gradient, the rank holds at this moment."""


def worst_moments(schedule: Schedule) -> list[list[Moment]]:
    """Returns, by rank, the moments that no other moment equals or exceeds in every number. The rank's peak of memory is always at
    one of them, however many bytes a micro-batch takes at each stage."""
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
    return [moment for moment in sorted(moments, reverse=True) if not any(_covers(other, moment) for other in moments)]


_CHANGES = {Kind.FORWARD: (1, 0), Kind.BACKWARD: (-1, 0), Kind.INPUT_GRADIENT: (-1, 1), Kind.WEIGHT_GRADIENT: (0, -1)}


def _covers(other: Moment, moment: Moment) -> bool:
    return other != moment and all(a >= c and b >= d for (a, b), (c, d) in zip(other, moment, strict=True))

"""Finds the moments at which a schedule needs most memory, for stages of any size.

A micro-batch's activations at a stage are held from its forward pass to its backward pass. If the backward pass is split, they are
held until I (the input gradient), and the operands of the weight gradients from I to W (the weight gradient). While B or I runs, it
takes memory for gradients and intermediate results besides.
"""

from collections.abc import Iterator

from bagualu.parallel.pipeline.schedules.schedule import Action, Kind, Schedule

Moment = tuple[tuple[int, int], ...]
"""For each stage of a rank, in order, two numbers of micro-batches: those whose activations, and those whose operands of the weight
gradient, the rank holds at this moment."""


def worst_moments(schedule: Schedule) -> list[list[Moment]]:
    """Returns, by rank, the moments that no other moment equals or exceeds in every number. The rank's peak of memory is always at
    one of them, however many bytes a micro-batch takes at each stage."""
    placement, known = schedule.placement, schedule.known
    if "worst_moments" not in known:
        known["worst_moments"] = [_worst(actions, placement.stages_of(rank)) for rank, actions in enumerate(schedule.actions)]
    found: list[list[Moment]] = known["worst_moments"]
    return found


def worst_passes(schedule: Schedule, first: bool | None = None) -> list[list[tuple[int, Moment]]]:
    """Returns, by rank, pairs (index of the stage among the rank's stages, moment): the moments at which B or I of that stage
    begins, without those that another moment at which it begins equals or exceeds in every number. `first`: only the first B or I
    of each stage (True), only those after it (False), or all (None)."""
    placement, known, name = schedule.placement, schedule.known, f"worst_passes {first}"
    if name not in known:
        known[name] = [_worst_passes(actions, placement.stages_of(rank), first) for rank, actions in enumerate(schedule.actions)]
    found: list[list[tuple[int, Moment]]] = known[name]
    return found


def _worst(actions: list[Action], stages: list[int]) -> list[Moment]:
    return _uncovered({after for _, _, after in _moments(actions, stages)})


def _worst_passes(actions: list[Action], stages: list[int], first: bool | None) -> list[tuple[int, Moment]]:
    begun: dict[int, set[Moment]] = {}
    seen: set[int] = set()
    for action, before, _ in _moments(actions, stages):
        if action.kind in (Kind.BACKWARD, Kind.INPUT_GRADIENT):
            if first in (None, action.stage not in seen):
                begun.setdefault(stages.index(action.stage), set()).add(before)
            seen.add(action.stage)
    return [(chunk, moment) for chunk, moments in begun.items() for moment in _uncovered(moments)]


def _moments(actions: list[Action], stages: list[int]) -> Iterator[tuple[Action, Moment, Moment]]:
    """Yields every pass with the moment before and the moment after it."""
    held = {stage: [0, 0] for stage in stages}
    before: Moment = tuple((0, 0) for _ in stages)
    for action in actions:
        if change := _CHANGES.get(action.kind):
            held[action.stage][0] += change[0]
            held[action.stage][1] += change[1]
            after = tuple((activations, operands) for activations, operands in held.values())
            yield action, before, after
            before = after


def _uncovered(moments: set[Moment]) -> list[Moment]:
    """Returns the moments that no other covers. Those that cover a moment come before it in this order, and one of them is not
    covered itself."""
    found: list[Moment] = []
    for moment in sorted(moments, reverse=True):
        if not any(_covers(other, moment) for other in found):
            found.append(moment)
    return found


_CHANGES = {Kind.FORWARD: (1, 0), Kind.BACKWARD: (-1, 0), Kind.INPUT_GRADIENT: (-1, 1), Kind.WEIGHT_GRADIENT: (0, -1)}


def _covers(other: Moment, moment: Moment) -> bool:
    return all(a >= c and b >= d for (a, b), (c, d) in zip(other, moment, strict=True))

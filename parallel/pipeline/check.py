"""Proves a schedule right before anything runs it: complete, in order, and free of deadlock. Free of torch."""

from collections import Counter, deque
from dataclasses import dataclass
from itertools import pairwise

from bagualu.parallel.pipeline.schedule import Action, Kind, Schedule, with_messages

_PAIRS = {Kind.SEND_ACTIVATION: (Kind.RECEIVE_ACTIVATION, 1), Kind.SEND_GRADIENT: (Kind.RECEIVE_GRADIENT, -1)}


class ScheduleError(ValueError):
    """A schedule that is wrong, with the stage and the action at fault."""


@dataclass(frozen=True)
class Report:
    """What a correct schedule costs."""

    peak_in_flight: list[int]
    """By stage: the most micro-batches whose activations are held at once."""


def check(schedule: Schedule, micro_batches: int) -> Report:
    """Raises ScheduleError unless every stage does every micro-batch forward and backward exactly once, forward first, each
    pass after the message it needs and before the one it feeds, and all stages reach their end when sends do not block and
    messages of one direction between two stages keep their order."""
    # What every stage has to do for each micro-batch, in this order, whatever it does in between.
    passes = [[Action(Kind.FORWARD, m), Action(Kind.BACKWARD, m)] for m in range(micro_batches)]
    chains = [with_messages([pair] * len(schedule)) for pair in passes]
    for stage, actions in enumerate(schedule):
        _check_stage(stage, actions, [chain[stage] for chain in chains])
    _run_dry(schedule)
    return Report([_peak(actions) for actions in schedule])


def _check_stage(stage: int, actions: list[Action], expected: list[list[Action]]) -> None:
    counts, place = Counter(actions), {action: index for index, action in enumerate(actions)}
    wanted = Counter(action for chain in expected for action in chain)
    for action in wanted | counts:
        if counts[action] != wanted[action]:
            raise ScheduleError(f"stage {stage} does {action} {counts[action]} times instead of {wanted[action]}")
    for chain in expected:
        for earlier, later in pairwise(chain):
            if place[earlier] > place[later]:
                raise ScheduleError(f"stage {stage} does {later} before {earlier}")


def _run_dry(schedule: Schedule) -> None:
    """Every stage goes on until it needs a message that has not been sent."""
    inboxes: dict[tuple[int, Kind], deque[int]] = {}
    place = [0] * len(schedule)
    moved = True
    while moved:
        moved = False
        for stage, actions in enumerate(schedule):
            while place[stage] < len(actions) and _do(stage, actions[place[stage]], inboxes):
                place[stage] += 1
                moved = True
    stuck = [f"stage {s} at {actions[place[s]]}" for s, actions in enumerate(schedule) if place[s] < len(actions)]
    if stuck:
        raise ScheduleError("deadlock: " + ", ".join(stuck))


def _do(stage: int, action: Action, inboxes: dict[tuple[int, Kind], deque[int]]) -> bool:
    if action.kind in _PAIRS:
        kind, step = _PAIRS[action.kind]
        inboxes.setdefault((stage + step, kind), deque()).append(action.micro_batch)
    elif action.kind in (Kind.RECEIVE_ACTIVATION, Kind.RECEIVE_GRADIENT):
        inbox = inboxes.setdefault((stage, action.kind), deque())
        if not inbox:
            return False
        if inbox[0] != action.micro_batch:
            raise ScheduleError(f"stage {stage} wants {action} but the next message is of micro-batch {inbox[0]}")
        inbox.popleft()
    return True


def _peak(actions: list[Action]) -> int:
    held = peak = 0
    for action in actions:
        held += {Kind.FORWARD: 1, Kind.BACKWARD: -1}.get(action.kind, 0)
        peak = max(peak, held)
    return peak

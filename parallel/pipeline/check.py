"""Proves a schedule right before anything runs it: complete, in order, and free of deadlock. Free of torch."""

from collections import Counter, deque
from dataclasses import dataclass
from itertools import pairwise

from bagualu.parallel.pipeline.schedule import RECEIVES, SENDS, Action, Kind, Placement, Schedule, surrounded

_SPLIT = (Kind.INPUT_GRADIENT, Kind.WEIGHT_GRADIENT)
_RELEASES = (Kind.BACKWARD, Kind.WEIGHT_GRADIENT)
"""After these nothing of a forward pass is held any more."""


class ScheduleError(ValueError):
    """A schedule that is wrong, with the rank and the action at fault."""


@dataclass(frozen=True)
class Report:
    """What a correct schedule costs."""

    peak_in_flight: list[int]
    """By rank: the most forward passes, of all its stages, whose activations are held at once. One is what a stage holds of one
    micro-batch, so with v chunks 1/v of what the rank would hold of it."""
    peak_by_stage: list[int]
    """By stage: its own part of that at its own worst moment."""


def check(schedule: Schedule) -> Report:
    """Raises ScheduleError unless every stage does every micro-batch forward and backward exactly once, the backward pass whole or
    in its two parts, in this order, each pass after the message it needs and before the one it feeds; and all ranks reach their end
    when sends do not block and messages of one kind from one rank to another keep their order."""
    for rank, actions in enumerate(schedule.actions):
        _check_rank(rank, actions, schedule)
    run_dry(schedule)
    by_rank = [_peaks(actions) for actions in schedule.actions]
    own = {stage: peak for _, peaks in by_rank for stage, peak in peaks.items()}
    return Report([peak for peak, _ in by_rank], [own[stage] for stage in range(schedule.placement.stages)])


def _check_rank(rank: int, actions: list[Action], schedule: Schedule) -> None:
    place = {action: index for index, action in enumerate(actions)}
    chains = [
        _chain(stage, m, place, schedule.placement)
        for stage in schedule.placement.stages_of(rank)
        for m in range(schedule.micro_batches)
    ]
    counts, wanted = Counter(actions), Counter(action for chain in chains for action in chain)
    for action in wanted | counts:
        if counts[action] != wanted[action]:
            raise ScheduleError(f"rank {rank} does {action} {counts[action]} times instead of {wanted[action]}")
    for chain in (*chains, *_handed_on(rank, place, schedule)):
        for earlier, later in pairwise(chain):
            if place[earlier] > place[later]:
                raise ScheduleError(f"rank {rank} does {later} before {earlier}")


def _chain(stage: int, micro_batch: int, place: dict[Action, int], placement: Placement) -> list[Action]:
    """What a rank has to do for one micro-batch at one stage, in this order, whatever it does in between."""
    split = Action(Kind.INPUT_GRADIENT, micro_batch, stage) in place
    kinds = (Kind.FORWARD, *(_SPLIT if split else (Kind.BACKWARD,)))
    return [one for kind in kinds for one in surrounded(Action(kind, micro_batch, stage), placement)]


def _handed_on(rank: int, place: dict[Action, int], schedule: Schedule) -> list[list[Action]]:
    """The passes of a rank that need, without a message, what it did itself at the stage before or after."""
    placement = schedule.placement
    chains = []
    for stage in placement.stages_of(rank):
        if stage + 1 == placement.stages or placement.rank_of(stage + 1) != rank:
            continue
        for m in range(schedule.micro_batches):
            chains.append([Action(Kind.FORWARD, m, stage), Action(Kind.FORWARD, m, stage + 1)])
            chains.append([_gradient(m, stage + 1, place), _gradient(m, stage, place)])
    return chains


def _gradient(micro_batch: int, stage: int, place: dict[Action, int]) -> Action:
    """The pass that gives the gradient of the stage's input."""
    split = Action(Kind.INPUT_GRADIENT, micro_batch, stage)
    return split if split in place else Action(Kind.BACKWARD, micro_batch, stage)


Channel = tuple[Kind, int, int]
"""Messages that keep their order: the kind of their receive, the rank they come from and the one they go to."""


def channel(action: Action, placement: Placement) -> Channel:
    """Where a message travels. Activations go to the stage after, gradients to the one before."""
    kind = Kind.RECEIVE_ACTIVATION if action.kind in (Kind.RECEIVE_ACTIVATION, Kind.SEND_ACTIVATION) else Kind.RECEIVE_GRADIENT
    ahead = 1 if kind == Kind.RECEIVE_ACTIVATION else -1
    here = placement.rank_of(action.stage)
    if action.kind in SENDS:
        return kind, here, placement.rank_of(action.stage + ahead)
    return kind, placement.rank_of(action.stage - ahead), here


def run_dry(schedule: Schedule) -> list[tuple[int, Action]]:
    """(rank, action) of all actions in an order in which they can be done: every rank goes on until it needs a message that has not
    been sent. Raises ScheduleError when there is none."""
    inboxes: dict[Channel, deque[Action]] = {}
    done: list[tuple[int, Action]] = []
    place = [0] * len(schedule.actions)
    moved = True
    while moved:
        moved = False
        for rank, actions in enumerate(schedule.actions):
            while place[rank] < len(actions) and _do(rank, actions[place[rank]], schedule.placement, inboxes):
                done.append((rank, actions[place[rank]]))
                place[rank] += 1
                moved = True
    stuck = [f"rank {r} at {actions[place[r]]}" for r, actions in enumerate(schedule.actions) if place[r] < len(actions)]
    if stuck:
        raise ScheduleError("deadlock: " + ", ".join(stuck))
    return done


def _do(rank: int, action: Action, placement: Placement, inboxes: dict[Channel, deque[Action]]) -> bool:
    if action.kind in SENDS:
        inboxes.setdefault(channel(action, placement), deque()).append(received_as(action))
    elif action.kind in RECEIVES:
        inbox = inboxes.get(channel(action, placement))
        if not inbox:
            return False
        if inbox[0] != action:
            raise ScheduleError(f"rank {rank} wants {action} but the next message is {inbox[0]}")
        inbox.popleft()
    return True


def received_as(send: Action) -> Action:
    """The receive at the other end of a send."""
    if send.kind == Kind.SEND_ACTIVATION:
        return Action(Kind.RECEIVE_ACTIVATION, send.micro_batch, send.stage + 1)
    return Action(Kind.RECEIVE_GRADIENT, send.micro_batch, send.stage - 1)


def _peaks(actions: list[Action]) -> tuple[int, dict[int, int]]:
    """The most that is held at once by the rank, and by each of its stages."""
    held: Counter[int] = Counter()
    peak, peaks = 0, Counter[int]()
    for action in actions:
        held[action.stage] += (action.kind == Kind.FORWARD) - (action.kind in _RELEASES)
        peak = max(peak, held.total())
        peaks[action.stage] = max(peaks[action.stage], held[action.stage])
    return peak, dict(peaks)

"""Checks that a schedule is complete, in a valid order and free of deadlock, before it runs."""

from collections import Counter, deque
from itertools import accumulate, pairwise

from bagualu.parallel.layout import StagePlacement
from bagualu.parallel.pipeline.schedules.schedule import (
    PASSES,
    RECEIVES,
    SENDS,
    Action,
    Kind,
    Schedule,
    dependencies,
    parts,
    surrounded,
)

_SPLIT = (Kind.INPUT_GRADIENT, Kind.WEIGHT_GRADIENT)
_RELEASES = (Kind.BACKWARD, Kind.WEIGHT_GRADIENT)
"""The passes after which the activations of the stage's forward pass of that micro-batch are freed."""


class ScheduleError(ValueError):
    """A schedule is wrong. The message names the rank and the action."""


def check(schedule: Schedule) -> list[int]:
    """Returns the activation memory that the schedule needs: for each rank, the most forward passes, of all its stages together,
    whose activations are held at the same time. With v chunks, each pass counts for 1/v of the rank's layers. Raises ScheduleError
    if the schedule is wrong.

    A correct schedule does every micro-batch at every stage forward and then backward exactly once, the backward pass whole or as I
    and then W. Each pass comes after the message it needs and before the message it feeds. And all ranks reach the end of their
    lists, provided that sends do not block and messages of the same kind between the same two ranks keep their order.
    """
    for rank, actions in enumerate(schedule.actions):
        _check_rank(rank, actions, schedule)
    run_dry(schedule)
    return [_peak(actions) for actions in schedule.actions]


def _check_rank(rank: int, actions: list[Action], schedule: Schedule) -> None:
    position = {action: index for index, action in enumerate(actions)}
    chains = [
        _chain(stage, m, position, schedule.placement)
        for stage in schedule.placement.stages_of(rank)
        for m in range(schedule.micro_batches)
    ]
    counts, wanted = Counter(actions), Counter(action for chain in chains for action in chain)
    for action in wanted | counts:
        if counts[action] != wanted[action]:
            raise ScheduleError(f"rank {rank} does {action} {counts[action]} times instead of {wanted[action]}")
    ordered = [pair for chain in chains for pair in pairwise(chain)]
    for earlier, later in [*ordered, *_local_dependencies(rank, actions, schedule.placement)]:
        if position[earlier] > position[later]:
            raise ScheduleError(f"rank {rank} does {later} before {earlier}")


def _chain(stage: int, micro_batch: int, position: dict[Action, int], placement: StagePlacement) -> list[Action]:
    """Returns all actions of a micro-batch at a stage in the order that they must keep; other actions may lie between them."""
    split = Action(Kind.INPUT_GRADIENT, micro_batch, stage) in position
    kinds = (Kind.FORWARD, *(_SPLIT if split else (Kind.BACKWARD,)))
    return [action for kind in kinds for action in surrounded(Action(kind, micro_batch, stage), placement)]


def _local_dependencies(rank: int, actions: list[Action], placement: StagePlacement) -> list[tuple[Action, Action]]:
    """Returns pairs (earlier, later) of this rank's passes: the later pass needs the earlier pass's result, without a message."""
    gives = {part: action for action in actions if action.kind in PASSES for part in parts(action)}
    return [
        (gives[needed], action)
        for action in actions
        if action.kind in PASSES
        for needed in dependencies(action, placement)
        if placement.rank_of(needed.stage) == rank
    ]


Channel = tuple[Kind, int, int]
"""(kind of the receive, source rank, destination rank). Messages of the same channel keep their order."""


def channel(action: Action, placement: StagePlacement) -> Channel:
    """Returns the channel of a send or receive. Activations go to the next stage, gradients to the previous
    stage."""
    kind = Kind.RECEIVE_ACTIVATION if action.kind in (Kind.RECEIVE_ACTIVATION, Kind.SEND_ACTIVATION) else Kind.RECEIVE_GRADIENT
    ahead = 1 if kind == Kind.RECEIVE_ACTIVATION else -1
    rank = placement.rank_of(action.stage)
    if action.kind in SENDS:
        return kind, rank, placement.rank_of(action.stage + ahead)
    return kind, placement.rank_of(action.stage - ahead), rank


def run_dry(schedule: Schedule) -> list[tuple[int, Action]]:
    """Returns (rank, action) of all actions in an order in which they can be executed: each rank runs until it needs a message that
    has not been sent. Raises ScheduleError if the ranks deadlock or the next message of a receive's channel is not the one that it
    expects."""
    inboxes: dict[Channel, deque[Action]] = {}
    done: list[tuple[int, Action]] = []
    next_index = [0] * len(schedule.actions)
    moved = True
    while moved:
        moved = False
        for rank, actions in enumerate(schedule.actions):
            while next_index[rank] < len(actions) and _do(rank, actions[next_index[rank]], schedule.placement, inboxes):
                done.append((rank, actions[next_index[rank]]))
                next_index[rank] += 1
                moved = True
    stuck = [f"rank {r} at {actions[next_index[r]]}" for r, actions in enumerate(schedule.actions) if next_index[r] < len(actions)]
    if stuck:
        raise ScheduleError("deadlock: " + ", ".join(stuck))
    return done


def _do(rank: int, action: Action, placement: StagePlacement, inboxes: dict[Channel, deque[Action]]) -> bool:
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
    """Returns the receive that matches a send."""
    if send.kind == Kind.SEND_ACTIVATION:
        return Action(Kind.RECEIVE_ACTIVATION, send.micro_batch, send.stage + 1)
    return Action(Kind.RECEIVE_GRADIENT, send.micro_batch, send.stage - 1)


def _peak(actions: list[Action]) -> int:
    """Returns the most forward passes whose activations are in memory at the same time."""
    return max(accumulate((action.kind == Kind.FORWARD) - (action.kind in _RELEASES) for action in actions), default=0)

"""One rank's part of a schedule, and what it may know of the others while it executes it. Free of torch."""

from dataclasses import dataclass, field

from bagualu.parallel.pipeline.check import received_as, run_dry
from bagualu.parallel.pipeline.schedule import RECEIVES, SENDS, Action, Schedule


@dataclass(frozen=True)
class Program:
    """What one rank does."""

    actions: list[Action]
    arrived: dict[Action, list[Action]] = field(default_factory=dict)
    """For a receive: earlier sends of this rank that have certainly been received once it is done, so that waiting for them takes
    no time and what they sent can be let go."""


def program(schedule: Schedule, rank: int) -> Program:
    """The part of `rank`. Raises ScheduleError when the schedule cannot be done.

    A message says how far its sender had come, and how far those were that the sender had heard of (vector clocks, Mattern 1989); a
    send has arrived once its receiver is known to have come past the receive.
    """
    places = [{action: place for place, action in enumerate(actions)} for actions in schedule.actions]
    heard = [[0] * len(schedule.actions) for _ in schedule.actions]
    under_way: dict[Action, list[int]] = {}
    sent: list[Action] = []
    arrived: dict[Action, list[Action]] = {}
    for here, action in run_dry(schedule):
        if action.kind in SENDS:
            under_way[received_as(action)] = list(heard[here])
            if here == rank:
                sent.append(action)
        elif action.kind in RECEIVES:
            heard[here] = [max(pair) for pair in zip(heard[here], under_way.pop(action), strict=True)]
        heard[here][here] = places[here][action] + 1
        if here == rank and action.kind in RECEIVES:
            there = [send for send in sent if _is_there(send, schedule, places, heard[here])]
            if there:
                arrived[action] = there
                sent = [send for send in sent if send not in there]
    return Program(schedule.actions[rank], arrived)


def _is_there(send: Action, schedule: Schedule, places: list[dict[Action, int]], heard: list[int]) -> bool:
    receive = received_as(send)
    receiver = schedule.placement.rank_of(receive.stage)
    return heard[receiver] > places[receiver][receive]

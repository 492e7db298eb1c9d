"""A rank's part of a schedule and, for each of its receives, which of its own earlier sends have certainly arrived by then."""

from dataclasses import dataclass, field

from bagualu.parallel.pipeline.check import received_as, run_dry
from bagualu.parallel.pipeline.schedules.schedule import RECEIVES, SENDS, Action, Schedule


@dataclass(frozen=True)
class Program:
    """The actions of a rank and, for each of its receives, its earlier sends that other ranks have certainly received by then."""

    actions: list[Action]
    arrived: dict[Action, list[Action]] = field(default_factory=dict)
    """For a receive, the earlier sends of this rank that other ranks have certainly received when that receive ends. Waiting for
    them takes no time, and then their tensors can be freed."""


def program(schedule: Schedule, rank: int) -> Program:
    """Returns the program of `rank`. Raises ScheduleError if the schedule cannot be executed."""
    return programs(schedule)[rank]


def programs(schedule: Schedule) -> list[Program]:
    """Returns the program of each rank. Raises ScheduleError if the schedule cannot be executed.

    A message shows how far its sender has got, and how far the other ranks had got as far as the sender knew (vector clocks,
    Mattern 1989). A send has been received once the receiving rank is known to be past the receive.
    """
    made = [Program(actions) for actions in schedule.actions]
    positions = [{action: index for index, action in enumerate(actions)} for actions in schedule.actions]
    known = [[0] * len(schedule.actions) for _ in schedule.actions]  # known[i][j]: actions of rank j that rank i knows are done
    in_transit: dict[Action, list[int]] = {}
    sent: list[list[Action]] = [[] for _ in schedule.actions]
    for rank, action in run_dry(schedule):
        if action.kind in SENDS:
            in_transit[received_as(action)] = list(known[rank])
            sent[rank].append(action)
        elif action.kind in RECEIVES:
            known[rank] = list(map(max, known[rank], in_transit.pop(action)))
        known[rank][rank] = positions[rank][action] + 1
        if action.kind in RECEIVES:
            received = [send for send in sent[rank] if _is_received(send, schedule, positions, known[rank])]
            if received:
                made[rank].arrived[action] = received
                sent[rank] = [send for send in sent[rank] if send not in received]
    return made


def _is_received(send: Action, schedule: Schedule, positions: list[dict[Action, int]], known: list[int]) -> bool:
    receive = received_as(send)
    receiver = schedule.placement.rank_of(receive.stage)
    return known[receiver] > positions[receiver][receive]

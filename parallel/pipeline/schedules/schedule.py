"""Pipeline schedules as data: for every pipeline rank, the list of its actions in order.

A model is divided into stages, contiguous slices of its layers. A rank holds one or several of them, its chunks (`StagePlacement`).
F3 is the forward pass of micro-batch 3 and B3 its backward pass. Some schedules split the backward pass: I3 computes the gradient
of the stage's input, for which the previous stage waits; later, W3 computes the gradients of the stage's weights, for which no
stage waits. If a rank has several stages, F3' is a pass of its second stage.

`registry.py` computes the passes; `with_messages` adds the sends and receives. The resulting list is checked (check.py), timed
(timeline.py), drawn (draw_text.py) and executed (runtime.py).
"""

from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

from bagualu.parallel.layout import StagePlacement


class Kind(StrEnum):
    FORWARD = "F"
    BACKWARD = "B"
    INPUT_GRADIENT = "I"
    WEIGHT_GRADIENT = "W"
    RECEIVE_ACTIVATION = "RA"
    SEND_ACTIVATION = "SA"
    RECEIVE_GRADIENT = "RG"
    SEND_GRADIENT = "SG"


PASSES = (Kind.FORWARD, Kind.BACKWARD, Kind.INPUT_GRADIENT, Kind.WEIGHT_GRADIENT)
RECEIVES = (Kind.RECEIVE_ACTIVATION, Kind.RECEIVE_GRADIENT)
SENDS = (Kind.SEND_ACTIVATION, Kind.SEND_GRADIENT)


@dataclass(frozen=True)
class Action:
    """A pass of a rank for a micro-batch at one of its stages, or a message that the rank sends or receives for that
    stage."""

    kind: Kind
    micro_batch: int
    stage: int

    def __str__(self) -> str:
        return f"{self.kind}{self.micro_batch} of stage {self.stage}"


@dataclass(frozen=True)
class Schedule:
    """The actions of every pipeline rank in a step."""

    placement: StagePlacement
    micro_batches: int
    actions: list[list[Action]]
    """For each pipeline rank, its actions in order."""
    known: dict[str, Any] = field(default_factory=dict, compare=False, repr=False)
    """What follows from the actions and takes long to compute, by name, once it was asked for."""


def forward_only(placement: StagePlacement, micro_batches: int) -> Schedule:
    """Returns a schedule of forward passes only, for validation. Each rank does all micro-batches of a chunk before the next chunk,
    so that it does not wait for its own output."""
    ranks = [placement.stages_of(rank) for rank in range(placement.ranks)]
    actions = [[Action(Kind.FORWARD, m, stage) for stage in stages for m in range(micro_batches)] for stages in ranks]
    return Schedule(placement, micro_batches, actions)


def with_messages(schedule: Schedule) -> Schedule:
    """Returns the schedule with a receive right before each pass that needs a message, and a send right after each pass whose
    result another rank needs."""
    actions = [[item for action in mine for item in surrounded(action, schedule.placement)] for mine in schedule.actions]
    return Schedule(schedule.placement, schedule.micro_batches, actions)


def parts(action: Action) -> tuple[Action, ...]:
    """Returns the passes that `action` consists of: I and W for a whole backward pass, else the action itself."""
    if action.kind != Kind.BACKWARD:
        return (action,)
    return tuple(Action(kind, action.micro_batch, action.stage) for kind in (Kind.INPUT_GRADIENT, Kind.WEIGHT_GRADIENT))


def dependencies(action: Action, placement: StagePlacement) -> tuple[Action, ...]:
    """Returns the passes, on any rank, whose results the pass `action` needs. A gradient is always given as the INPUT_GRADIENT that
    computes it, which may be a part of a whole backward pass (`parts`)."""
    m, stage = action.micro_batch, action.stage
    if action.kind == Kind.FORWARD:
        return (Action(Kind.FORWARD, m, stage - 1),) if stage else ()
    if action.kind == Kind.WEIGHT_GRADIENT:
        return (Action(Kind.INPUT_GRADIENT, m, stage),)
    own = Action(Kind.FORWARD, m, stage)
    return (own, Action(Kind.INPUT_GRADIENT, m, stage + 1)) if stage + 1 < placement.stages else (own,)


def surrounded(action: Action, placement: StagePlacement) -> list[Action]:
    """Returns a pass with the receive before it and the send after it, if it needs them. Two stages on the same rank exchange no
    message."""
    if action.kind == Kind.WEIGHT_GRADIENT:
        return [action]
    forward = action.kind == Kind.FORWARD
    receive, send = (
        (Kind.RECEIVE_ACTIVATION, Kind.SEND_ACTIVATION) if forward else (Kind.RECEIVE_GRADIENT, Kind.SEND_GRADIENT)
    )  # fmt: skip
    ahead = 1 if forward else -1
    actions = [action]
    if placement.neighbour(action.stage, -ahead) is not None:
        actions.insert(0, Action(receive, action.micro_batch, action.stage))
    if placement.neighbour(action.stage, ahead) is not None:
        actions.append(Action(send, action.micro_batch, action.stage))
    return actions

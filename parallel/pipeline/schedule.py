"""Pipeline schedules as data: for every pipeline rank, the list of its actions in order.

A model is divided into stages, contiguous slices of its layers. A rank holds one or several of them, its chunks (`Placement`). F3
is the forward pass of micro-batch 3 and B3 its backward pass. Some schedules split the backward pass: I3 computes the gradient of
the stage's input, for which the previous stage waits; later, W3 computes the gradients of its weights, for which no stage waits. If
a rank has several stages, F3' is a pass of its second stage.

`generate.py` makes the passes; `with_messages` adds the sends and receives. The resulting list is checked (check.py), timed
(timeline.py), drawn (draw.py) and executed (runtime.py).
"""

from dataclasses import dataclass
from enum import StrEnum


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
    """A pass of a rank for a micro-batch at one of its stages, or a message. A message's stage is that of the rank that acts."""

    kind: Kind
    micro_batch: int
    stage: int

    def __str__(self) -> str:
        return f"{self.kind}{self.micro_batch} of stage {self.stage}"


@dataclass(frozen=True)
class Placement:
    """Which pipeline rank holds which stages: `chunks` stages on each of `ranks` ranks.

    Consecutive stages lie on consecutive ranks and start again at rank 0 after the last rank. With `v_shaped`, every second pass
    over the ranks runs backwards, so with two chunks the last stage lies on the rank of the first.
    """

    ranks: int
    chunks: int = 1
    v_shaped: bool = False

    @property
    def stages(self) -> int:
        return self.ranks * self.chunks

    def rank_of(self, stage: int) -> int:
        chunk, index = divmod(stage, self.ranks)
        return self.ranks - 1 - index if self.v_shaped and chunk % 2 else index

    def stages_of(self, rank: int) -> list[int]:
        """Returns the rank's stages in the order of the model; the index into this list is the chunk."""
        return [stage for stage in range(self.stages) if self.rank_of(stage) == rank]

    def neighbour(self, stage: int, step: int) -> int | None:
        """Returns the rank of the next (`step` 1) or previous (-1) stage; None if there is none or `stage`'s own rank holds it."""
        other = stage + step
        if not 0 <= other < self.stages or self.rank_of(other) == self.rank_of(stage):
            return None
        return self.rank_of(other)


@dataclass(frozen=True)
class Schedule:
    """The actions of every pipeline rank in a step."""

    placement: Placement
    micro_batches: int
    actions: list[list[Action]]
    """The list of each rank."""


def forward_only(placement: Placement, micro_batches: int) -> Schedule:
    """Returns forward passes for validation: all micro-batches of a chunk before the next, so a rank need not wait for its own
    output."""
    ranks = [placement.stages_of(rank) for rank in range(placement.ranks)]
    actions = [[Action(Kind.FORWARD, m, stage) for stage in stages for m in range(micro_batches)] for stages in ranks]
    return Schedule(placement, micro_batches, actions)


def with_messages(schedule: Schedule) -> Schedule:
    """Returns the schedule with a receive right before each pass that needs a message and a send right after each that feeds
    one."""
    actions = [[item for action in mine for item in surrounded(action, schedule.placement)] for mine in schedule.actions]
    return Schedule(schedule.placement, schedule.micro_batches, actions)


def surrounded(action: Action, placement: Placement) -> list[Action]:
    """Returns a pass with the messages it needs and feeds. Two stages on the same rank exchange no message."""
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

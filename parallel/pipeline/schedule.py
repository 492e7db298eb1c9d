"""Pipeline schedules as data: for every rank of the pipeline, the list of actions it does, in order. Free of torch.

A model is cut into stages, contiguous slices of its layers; a rank holds one of them or several, its chunks (`Placement`). F3 is
the forward pass of micro-batch 3, B3 its backward pass. Some schedules take the backward pass in two parts: I3 computes the
gradient of the stage's input, which the stage before waits for, and W3 later the gradients of its weights, which nobody waits for.
Where a rank has several stages, F3' is a pass of its second one.

`generate.py` gives the passes; `with_messages` puts in what has to be sent and received, and where. The same list is checked
(check.py), timed (timeline.py), drawn (draw.py) and executed (runtime.py).
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
    """One thing that a rank does for one micro-batch at one of its stages. A message names the stage at its own end."""

    kind: Kind
    micro_batch: int
    stage: int

    def __str__(self) -> str:
        return f"{self.kind}{self.micro_batch} of stage {self.stage}"


@dataclass(frozen=True)
class Placement:
    """Which rank of the pipeline holds which stages: `chunks` of them on each of `ranks` ranks.

    Stages go round and round over the ranks; `v_shaped`: there and back again, so that the last stage lies where the first does.
    """

    ranks: int
    chunks: int = 1
    v_shaped: bool = False

    @property
    def stages(self) -> int:
        return self.ranks * self.chunks

    def rank_of(self, stage: int) -> int:
        chunk, place = divmod(stage, self.ranks)
        return self.ranks - 1 - place if self.v_shaped and chunk % 2 else place

    def stages_of(self, rank: int) -> list[int]:
        """In the order of the model; the index in this list is the chunk."""
        return [stage for stage in range(self.stages) if self.rank_of(stage) == rank]

    def neighbour(self, stage: int, step: int) -> int | None:
        """The rank that holds the stage after (`step` 1) or before (-1), where it is another one than holds `stage`."""
        other = stage + step
        if not 0 <= other < self.stages or self.rank_of(other) == self.rank_of(stage):
            return None
        return self.rank_of(other)


@dataclass(frozen=True)
class Schedule:
    """What every rank of the pipeline does in a step."""

    placement: Placement
    micro_batches: int
    actions: list[list[Action]]
    """By rank."""


def forward_only(placement: Placement, micro_batches: int) -> Schedule:
    """What validation runs: chunk after chunk, so that no rank waits for its own output to come round."""
    ranks = [placement.stages_of(rank) for rank in range(placement.ranks)]
    actions = [[Action(Kind.FORWARD, m, stage) for stage in stages for m in range(micro_batches)] for stages in ranks]
    return Schedule(placement, micro_batches, actions)


def with_messages(schedule: Schedule) -> Schedule:
    """The same schedule with a receive right before each pass that needs one and a send right after each that feeds another."""
    actions = [[one for action in mine for one in surrounded(action, schedule.placement)] for mine in schedule.actions]
    return Schedule(schedule.placement, schedule.micro_batches, actions)


def surrounded(action: Action, placement: Placement) -> list[Action]:
    """A pass with the messages that it needs and feeds. Between two stages of one rank there are none."""
    if action.kind == Kind.WEIGHT_GRADIENT:
        return [action]
    forward = action.kind == Kind.FORWARD
    receive, send = (
        (Kind.RECEIVE_ACTIVATION, Kind.SEND_ACTIVATION) if forward else (Kind.RECEIVE_GRADIENT, Kind.SEND_GRADIENT)
    )  # fmt: skip
    ahead = 1 if forward else -1
    found = [action]
    if placement.neighbour(action.stage, -ahead) is not None:
        found.insert(0, Action(receive, action.micro_batch, action.stage))
    if placement.neighbour(action.stage, ahead) is not None:
        found.append(Action(send, action.micro_batch, action.stage))
    return found

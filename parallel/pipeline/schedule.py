"""Pipeline schedules as data: for every stage, the list of actions it does, in order. Pure functions, free of torch.

F3 is the forward pass of micro-batch 3, B3 its backward pass. Time goes right, each pass takes one step, a dot is a stage that
waits (draw.py draws this). 4 stages and 4 micro-batches, first gpipe, then 1f1b:

    F0 F1 F2 F3 .  .  .  .  .  .  B0 B1 B2 B3
       F0 F1 F2 F3 .  .  .  .  B0 B1 B2 B3
          F0 F1 F2 F3 .  .  B0 B1 B2 B3
             F0 F1 F2 F3 B0 B1 B2 B3

    F0 F1 F2 F3 .  .  .  B0 .  B1 .  B2 .  B3
       F0 F1 F2 .  .  B0 F3 B1 .  B2 .  B3
          F0 F1 .  B0 F2 B1 F3 B2 .  B3
             F0 B0 F1 B1 F2 B2 F3 B3

`compute_schedule` gives these; `with_messages` puts in what has to be sent and received, and where. The same list is checked
(check.py), drawn (draw.py) and executed (runtime.py).
"""

from dataclasses import dataclass
from enum import StrEnum

from bagualu.comm.errors import RecipeError


class Kind(StrEnum):
    FORWARD = "F"
    BACKWARD = "B"
    RECEIVE_ACTIVATION = "RA"
    SEND_ACTIVATION = "SA"
    RECEIVE_GRADIENT = "RG"
    SEND_GRADIENT = "SG"


@dataclass(frozen=True)
class Action:
    kind: Kind
    micro_batch: int

    def __str__(self) -> str:
        return f"{self.kind}{self.micro_batch}"


Schedule = list[list[Action]]
"""Actions by stage."""


def compute_schedule(name: str, stages: int, micro_batches: int) -> Schedule:
    """The forward and backward passes of each stage in order. Raises RecipeError for an unknown name."""
    if name not in _WARMUP:
        raise RecipeError(f"parallel.schedule={name} is unknown; give one of {', '.join(_WARMUP)}")
    return [_one_stage(min(_WARMUP[name](stages, stage, micro_batches), micro_batches), micro_batches) for stage in range(stages)]


# How many forward passes a stage does before it begins to alternate with backward passes, the one it alternates with not counted.
# gpipe: all of them (Huang et al., arXiv 1811.06965). 1f1b: as many as there are stages after it, so that its activations stay
# bounded by that (PipeDream-flush, arXiv 2006.09503, section 3).
_WARMUP = {
    "gpipe": lambda stages, stage, micro_batches: micro_batches,
    "1f1b": lambda stages, stage, micro_batches: stages - 1 - stage,
}

SCHEDULES = tuple(_WARMUP)


def _one_stage(warmup: int, micro_batches: int) -> list[Action]:
    actions = [Action(Kind.FORWARD, m) for m in range(warmup)]
    for m in range(micro_batches - warmup):
        actions += [Action(Kind.FORWARD, warmup + m), Action(Kind.BACKWARD, m)]
    return actions + [Action(Kind.BACKWARD, m) for m in range(micro_batches - warmup, micro_batches)]


def forward_only(stages: int, micro_batches: int) -> Schedule:
    """What validation runs."""
    return [[Action(Kind.FORWARD, m) for m in range(micro_batches)] for _ in range(stages)]


def with_messages(schedule: Schedule) -> Schedule:
    """The same schedule with a receive right before each pass that needs one and a send right after each that feeds another."""
    last = len(schedule) - 1
    return [
        [message for action in actions for message in _surrounded(action, stage, last)] for stage, actions in enumerate(schedule)
    ]


def _surrounded(action: Action, stage: int, last: int) -> list[Action]:
    m = action.micro_batch
    if action.kind == Kind.FORWARD:
        receive = [Action(Kind.RECEIVE_ACTIVATION, m)] if stage > 0 else []
        send = [Action(Kind.SEND_ACTIVATION, m)] if stage < last else []
    else:
        receive = [Action(Kind.RECEIVE_GRADIENT, m)] if stage < last else []
        send = [Action(Kind.SEND_GRADIENT, m)] if stage > 0 else []
    return [*receive, action, *send]

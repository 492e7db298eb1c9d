"""The schedules by name: pure functions from a placement and a number of micro-batches to the passes of each rank. Free of torch.

Time goes right, each pass takes one step, a dot is a rank that waits (draw.py draws this). 4 ranks and 4 micro-batches, first
gpipe, then 1f1b:

    F0 F1 F2 F3 .  .  .  .  .  .  B0 B1 B2 B3
       F0 F1 F2 F3 .  .  .  .  B0 B1 B2 B3
          F0 F1 F2 F3 .  .  B0 B1 B2 B3
             F0 F1 F2 F3 B0 B1 B2 B3

    F0 F1 F2 F3 .  .  .  B0 .  B1 .  B2 .  B3
       F0 F1 F2 .  .  B0 F3 B1 .  B2 .  B3
          F0 F1 .  B0 F2 B1 F3 B2 .  B3
             F0 B0 F1 B1 F2 B2 F3 B3
"""

from collections.abc import Callable
from dataclasses import dataclass

from bagualu.comm.errors import RecipeError
from bagualu.parallel.pipeline.schedule import Action, Kind, Placement, Schedule

Generate = Callable[[Placement, int], list[list[Action]]]
"""(placement, micro-batches) -> the passes of each rank in order."""


@dataclass(frozen=True)
class Family:
    """A schedule by name."""

    generate: Generate
    chunks: tuple[int, ...] | None = (1,)
    """Stages of one rank that it can take, the first unless told otherwise; None: any number from 2."""
    v_shaped: bool = False
    splits_backward: bool = False
    """Whether it takes the backward pass in two parts."""

    def placement(self, name: str, ranks: int, chunks: int | None) -> Placement:
        """Raises RecipeError when a rank cannot have `chunks` stages."""
        default = self.chunks[0] if self.chunks else 2
        chosen = default if chunks is None else chunks
        if (chosen not in self.chunks) if self.chunks else (chosen < 2):
            raise RecipeError(f"parallel.virtual_stages={chosen} does not go with parallel.schedule={name}; "
                              f"give parallel.virtual_stages={default}")  # fmt: skip
        return Placement(ranks, chosen, self.v_shaped)


def place(name: str, ranks: int, chunks: int | None = None) -> Placement:
    """Where the stages of the schedule `name` lie. Raises RecipeError for an unknown name or a number of chunks it cannot take."""
    if name not in FAMILIES:
        raise RecipeError(f"parallel.schedule={name} is unknown; give one of {', '.join(FAMILIES)}")
    return FAMILIES[name].placement(name, ranks, chunks)


def splits_backward(name: str) -> bool:
    """Whether the schedule `name` takes the backward pass in two parts."""
    return FAMILIES[name].splits_backward


def compute_schedule(name: str, ranks: int, micro_batches: int, chunks: int | None = None) -> Schedule:
    """The passes of each rank in order. Raises RecipeError for what the schedule `name` cannot do, with what it can."""
    placement = place(name, ranks, chunks)
    return Schedule(placement, micro_batches, FAMILIES[name].generate(placement, micro_batches))


def _gpipe(placement: Placement, micro_batches: int) -> list[list[Action]]:
    """All forward passes, then all backward passes (Huang et al., arXiv 1811.06965)."""
    return [_one_stage(stage, micro_batches, micro_batches) for stage in range(placement.ranks)]


def _1f1b(placement: Placement, micro_batches: int) -> list[list[Action]]:
    """As many forward passes first as there are stages after, then one backward, one forward, so that a stage's activations stay
    bounded by that number (PipeDream-flush, arXiv 2006.09503, section 3)."""
    last = placement.ranks - 1
    return [_one_stage(stage, min(last - stage, micro_batches), micro_batches) for stage in range(placement.ranks)]


def _one_stage(stage: int, warmup: int, micro_batches: int) -> list[Action]:
    def forward(m: int) -> Action:
        return Action(Kind.FORWARD, m, stage)

    def backward(m: int) -> Action:
        return Action(Kind.BACKWARD, m, stage)

    actions = [forward(m) for m in range(warmup)]
    for m in range(micro_batches - warmup):
        actions += [forward(warmup + m), backward(m)]
    return actions + [backward(m) for m in range(micro_batches - warmup, micro_batches)]


FAMILIES: dict[str, Family] = {
    "gpipe": Family(_gpipe),
    "1f1b": Family(_1f1b),
}
SCHEDULES = tuple(FAMILIES)

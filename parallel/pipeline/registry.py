"""The table of schedules by name. Each schedule is a function in schedules/, whose docstring describes it and its cost."""

from collections.abc import Callable
from dataclasses import dataclass

from bagualu.comm.errors import RecipeError
from bagualu.parallel.layout import StagePlacement
from bagualu.parallel.pipeline.schedules.dualpipe_v import DUALPIPE_V, dualpipe_v
from bagualu.parallel.pipeline.schedules.formula import Formula
from bagualu.parallel.pipeline.schedules.interleaved import INTERLEAVED_1F1B, interleaved_1f1b
from bagualu.parallel.pipeline.schedules.one_stage import GPIPE, ONE_F_ONE_B, ZB_H1, gpipe, one_f_one_b, zb_h1
from bagualu.parallel.pipeline.schedules.schedule import Action, Schedule
from bagualu.parallel.pipeline.schedules.v_half import V_HALF, v_half
from bagualu.parallel.pipeline.schedules.zb_v import ZB_V, zb_v

Generate = Callable[[StagePlacement, int], list[list[Action]]]
"""A function that takes (placement, number of micro-batches) and returns the passes of each rank in order."""


@dataclass(frozen=True)
class Family:
    """The properties of a named schedule."""

    generate: Generate
    formula: Formula
    chunks: tuple[int, ...] | None = (1,)
    """Supported numbers of stages per rank, the default first; None: any number from 2, with 2 as the default."""
    v_shaped: bool = False
    splits_backward: bool = False
    """Whether the schedule splits backward passes into I (input gradient) and W (weight gradient)."""

    def placement(self, name: str, ranks: int, chunks: int | None) -> StagePlacement:
        """Returns the placement of the stages. Raises RecipeError if the schedule does not support `chunks` stages per rank."""
        default = self.chunks[0] if self.chunks else 2
        chosen = default if chunks is None else chunks
        if (chosen not in self.chunks) if self.chunks else (chosen < 2):
            raise RecipeError(f"parallel.virtual_stages={chosen} does not go with parallel.schedule={name}; "
                              f"give parallel.virtual_stages={default}")  # fmt: skip
        return StagePlacement(ranks, chosen, self.v_shaped)


def placement_of(name: str, ranks: int, chunks: int | None = None) -> StagePlacement:
    """Returns the placement of the schedule `name`. Raises RecipeError for an unknown name or an unsupported number of chunks."""
    if name not in FAMILIES:
        raise RecipeError(f"parallel.schedule={name} is unknown; give one of {', '.join(FAMILIES)}")
    return FAMILIES[name].placement(name, ranks, chunks)


def splits_backward(name: str) -> bool:
    """Returns whether the schedule `name` splits backward passes into I (input gradient) and W (weight gradient)."""
    return FAMILIES[name].splits_backward


def compute_schedule(name: str, ranks: int, micro_batches: int, chunks: int | None = None) -> Schedule:
    """Returns the schedule `name`, without messages; `chunks` None: its default number of stages per rank. Raises RecipeError if
    there is no such schedule or it does not support `chunks` stages per rank."""
    placement = placement_of(name, ranks, chunks)
    return Schedule(placement, micro_batches, FAMILIES[name].generate(placement, micro_batches))


FAMILIES: dict[str, Family] = {
    "gpipe": Family(gpipe, GPIPE),
    "1f1b": Family(one_f_one_b, ONE_F_ONE_B),
    "interleaved_1f1b": Family(interleaved_1f1b, INTERLEAVED_1F1B, chunks=None),
    "zb_h1": Family(zb_h1, ZB_H1, splits_backward=True),
    "zb_v": Family(zb_v, ZB_V, chunks=(2,), v_shaped=True, splits_backward=True),
    "v_half": Family(v_half, V_HALF, chunks=(2,), v_shaped=True, splits_backward=True),
    "dualpipe_v": Family(dualpipe_v, DUALPIPE_V, chunks=(2,), v_shaped=True, splits_backward=True),
}
SCHEDULES = tuple(FAMILIES)

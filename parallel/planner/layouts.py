"""The layouts in which a model can be trained on a number of ranks: all combinations of degrees and settings that divide.

Left out is what another choice is never worse than: gpipe (1f1b takes as long and holds fewer activations) and ZeRO-0 (ZeRO-1
sends as many bytes and holds less). A key that the user gives is kept, so both can still be asked for. Tensor ranks stay within the
innermost tier of links, because they wait for each other several times in every layer. They have sequence parallelism, which sends
as much and holds less; what it is worth is seen from `without_sequence`.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import gcd
from typing import Any

from bagualu.comm.errors import RecipeError
from bagualu.parallel.layout import StagePlacement
from bagualu.parallel.pipeline.registry import FAMILIES, placement_of, splits_backward

MOST_TOKENS = 2**15
"""A micro-batch has at most as many tokens, unless it is a single sequence: matrix products of more rows are no faster, and fewer
micro-batches make the bubble longer."""
_MOST_STAGES_EACH = 8
"""The most stages per rank that are considered."""
_UNEVEN = (2, 4)
"""The numbers of stages per rank that are considered where stages cannot have equally many layers."""
_WORSE = {"parallel.schedule": ("gpipe",), "parallel.zero": (0,)}
"""Values that are not considered, because another is never worse."""


@dataclass(frozen=True, order=True)
class Degrees:
    """What determines the work of a rank for a micro-batch, and how ranks communicate for it."""

    data: int
    tensor: int
    pipeline: int
    expert: int
    micro_batch: int
    sequence: bool

    def values(self) -> dict[str, Any]:
        """Returns the values of the recipe's keys."""
        return {
            "parallel.data": self.data, "parallel.tensor": self.tensor, "parallel.pipeline": self.pipeline,
            "parallel.expert": self.expert, "train.micro_batch": self.micro_batch, "parallel.sequence": self.sequence,
        }  # fmt: skip


@dataclass(frozen=True)
class PlannedLayout:
    """A layout with all settings that a plan chooses."""

    degrees: Degrees
    schedule: str
    virtual_stages: int | None
    """Stages per rank; None: as many as the schedule has if nothing is given."""
    recompute: Any
    """As train.recompute."""
    zero: int | None
    """ZeRO stage; None: the engine's default."""
    balance: Any = "uniform"
    """As parallel.balance; a list as a tuple."""
    shares: tuple[int, ...] | None = None
    """As parallel.shares."""

    def values(self) -> dict[str, Any]:
        """Returns the values of the recipe's keys."""
        return self.degrees.values() | {
            "parallel.schedule": self.schedule, "parallel.virtual_stages": self.virtual_stages,
            "train.recompute": _plain(self.recompute), "parallel.zero": self.zero,
            "parallel.balance": _plain(self.balance), "parallel.shares": _plain(self.shares),
        }  # fmt: skip


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


KEYS = tuple(PlannedLayout(Degrees(1, 1, 1, 1, 1, False), "1f1b", None, "none", None).values())
"""The keys that a plan chooses."""


@dataclass(frozen=True)
class SearchSpace:
    """What the choice of a layout depends on."""

    world: int
    layers: int
    widths: tuple[int, ...]
    """What the tensor ranks divide: heads, heads of keys and values, widths of feed-forwards."""
    experts: int
    """0: none."""
    global_batch: int
    sequence_length: int
    most_tensor: int
    """The number of devices that the innermost tier of links joins."""
    zero_stages: Sequence[int] = (1,)
    """The stages that the engine has, ascending."""
    whole_backward: bool = False
    """Whether only schedules can run that do not split the backward pass."""
    unequal: bool = False
    """Whether devices are of different speed, so that an even division of layers or data is never the best."""
    fixed: Mapping[str, Any] = field(default_factory=dict)
    """The keys that the user has given, with their values."""

    def chosen(self, key: str, possible: Sequence[Any]) -> Sequence[Any]:
        """Returns the value that the user has given for `key`, or else those of `possible` that are worth considering."""
        if key in self.fixed:
            value = self.fixed[key]
            return [tuple(value) if isinstance(value, list) else value]
        return [value for value in possible if value not in _WORSE.get(key, ())] or list(possible)


def degrees(space: SearchSpace, plain: bool = False) -> Iterator[Degrees]:
    """Yields all degrees and micro-batches that divide; if `plain`, also those of tensor ranks without sequence parallelism."""
    for tensor in space.chosen("parallel.tensor", _tensor(space)):
        for pipeline in space.chosen("parallel.pipeline", _divisors(space.world // tensor, space.layers)):
            data, rest = divmod(space.world, tensor * pipeline)
            if rest or not data or space.fixed.get("parallel.data") not in (None, data):
                continue
            for expert in space.chosen("parallel.expert", _divisors(gcd(space.experts, data)) if space.experts else [1]):
                for of in _micro_batches(space, data, tensor, pipeline, expert):
                    yield of
                    if plain and of.sequence and "parallel.sequence" not in space.fixed:
                        yield replace(of, sequence=False)


def _tensor(space: SearchSpace) -> list[int]:
    """Returns the tensor degrees that divide the model and whose ranks share a domain of the innermost tier."""
    domain = min(space.most_tensor, space.world)
    return [tensor for tensor in _divisors(gcd(*space.widths), domain) if domain % tensor == 0]


def _micro_batches(space: SearchSpace, data: int, tensor: int, pipeline: int, expert: int) -> Iterator[Degrees]:
    each, rest = divmod(space.global_batch, data)
    if rest or data % expert:
        return
    possible = _divisors(each, max(1, MOST_TOKENS // space.sequence_length))
    divided = [tensor > 1 and space.sequence_length % tensor == 0]
    for micro_batch in space.chosen("train.micro_batch", possible):
        for sequence in space.chosen("parallel.sequence", divided):
            if each % micro_batch == 0 and (tensor > 1 or not sequence):
                yield Degrees(data, tensor, pipeline, expert, micro_batch, sequence)


def layouts(space: SearchSpace, of: Degrees) -> Iterator[PlannedLayout]:
    """Yields the layouts of these degrees: every schedule with its numbers of stages, recomputation and ZeRO stage."""
    zeros = space.chosen("parallel.zero", space.zero_stages)[: None if of.data > 1 else 1]  # one rank divides nothing
    (balance,) = space.chosen("parallel.balance", ["uniform"])
    (shares,) = space.chosen("parallel.shares", [None])
    for schedule, stages in _schedules(space, of.pipeline):
        for recompute in recomputes(space):
            for zero in zeros:
                yield PlannedLayout(of, schedule, stages, recompute, zero, balance, shares)


def heavier(space: SearchSpace, layout: PlannedLayout) -> Iterator[PlannedLayout]:
    """Yields, for a layout that recomputes least, those that recompute more. Their steps take longer, so that they are worth
    considering only if `layout` does not fit."""
    least, *others = recomputes(space)
    yield from (replace(layout, recompute=value) for value in others if layout.recompute == least)


def without_sequence(space: SearchSpace, layout: PlannedLayout) -> Iterator[PlannedLayout]:
    """Yields the layout without sequence parallelism, if it has it and need not."""
    if layout.degrees.sequence and "parallel.sequence" not in space.fixed:
        yield replace(layout, degrees=replace(layout.degrees, sequence=False))


def recomputes(space: SearchSpace) -> Sequence[Any]:
    """Returns values of train.recompute; the first takes least time, the last needs least memory."""
    possible = ["none", "attention", *(["experts"] if space.experts else []), "every:4", "every:2", "full"]
    return space.chosen("train.recompute", possible)


def _schedules(space: SearchSpace, pipeline: int) -> Iterator[tuple[str, int | None]]:
    """Yields schedules with the number of stages per rank."""
    names = [name for name in FAMILIES if not (space.whole_backward and splits_backward(name))]
    for name in space.chosen("parallel.schedule", names if pipeline > 1 else ["1f1b"]):
        several = FAMILIES[name].chunks is None
        for stages in space.chosen("parallel.virtual_stages", _stages_each(space, pipeline) if several else [None]):
            try:
                fits = placement_of(name, pipeline, stages).stages <= space.layers
            except RecipeError:  # the number of stages that the user gives is not one of this schedule
                continue
            if fits:
                yield name, stages


def _stages_each(space: SearchSpace, pipeline: int) -> list[int]:
    """Returns numbers of stages per rank, from 2: those with which all stages have equally many layers, if there are any."""
    possible = range(2, min(_MOST_STAGES_EACH, space.layers // pipeline) + 1)
    even = [stages for stages in possible if space.layers % (pipeline * stages) == 0]
    return even or [stages for stages in possible if stages in _UNEVEN]


def evened(counts: Sequence[float], placement: StagePlacement) -> tuple[int, ...]:
    """Returns numbers of layers per stage with which each rank has as many layers as with `counts`, all whole, and each of its
    stages as many as the others, the first ones a layer more. A rank's time does not show what long stages make others wait."""
    found = [int(count) for count in counts]
    assert found == list(counts), "halves of layers are not evened"
    for rank in range(placement.ranks):
        stages = placement.stages_of(rank)
        each, rest = divmod(sum(found[stage] for stage in stages), len(stages))
        for index, stage in enumerate(stages):
            found[stage] = each + (index < rest)
    return tuple(found)


def _divisors(number: int, most: int | None = None) -> list[int]:
    """Returns the divisors of `number` up to `most`, ascending."""
    return [divisor for divisor in range(1, min(number, most or number) + 1) if number % divisor == 0]


def neighbours(space: SearchSpace, layout: PlannedLayout) -> Iterator[PlannedLayout]:
    """Yields the layouts that differ from `layout` in one choice, besides what follows from it: the number of data ranks, and where
    one of the two has no tensor or pipeline axis or a single data rank, what needs one."""
    own = layout.degrees
    for of in degrees(space, plain=True):
        free = {"sequence"} if of.tensor != own.tensor and 1 in (of.tensor, own.tensor) else set()
        free |= {"zero"} if 1 in (of.data, own.data) else set()
        free |= {"schedule"} if of.pipeline != own.pipeline and 1 in (of.pipeline, own.pipeline) else set()
        if sum(name not in free and getattr(of, name) != getattr(own, name) for name in _CHOICES) > 1:
            continue
        for other in layouts(space, of):
            differs = {name for name in _CHOICES if getattr(of, name) != getattr(own, name)}
            differs |= {name for name in ("recompute", "zero") if getattr(other, name) != getattr(layout, name)}
            stages = of.pipeline == own.pipeline and other.virtual_stages != layout.virtual_stages
            differs |= {"schedule"} if stages or other.schedule != layout.schedule else set()
            if len(differs - free) == 1:
                yield _as_unequal(other, layout)


_CHOICES = ("tensor", "pipeline", "expert", "micro_batch", "sequence")
"""The degrees that do not follow from others."""


def _as_unequal(other: PlannedLayout, layout: PlannedLayout) -> PlannedLayout:
    """Returns `other` with the split and the shares of `layout` where these apply to it."""
    same_stages = (other.degrees.pipeline, other.schedule, other.virtual_stages) == (
        layout.degrees.pipeline, layout.schedule, layout.virtual_stages,
    )  # fmt: skip
    same_data = (other.degrees.data, other.degrees.micro_batch) == (layout.degrees.data, layout.degrees.micro_batch)
    return replace(
        other,
        balance=layout.balance if same_stages else other.balance,
        shares=layout.shares if same_data and other.degrees.expert == 1 and other.zero in (0, 1) else other.shares,
    )


_LEAN_SCHEDULES = ("1f1b", "v_half")
"""The schedules that hold fewest activations."""


def leanest(space: SearchSpace) -> Iterator[PlannedLayout]:
    """Yields, for each way to divide the model, the layouts with equal stages that take least memory. If none of them fits, no
    layout with equal stages does, but one with unequal stages may."""
    smallest: dict[tuple[object, ...], Degrees] = {}
    for of in degrees(space):
        key = of.data, of.tensor, of.pipeline, of.expert
        best = smallest.setdefault(key, of)
        if (of.micro_batch, not of.sequence) < (best.micro_batch, not best.sequence):
            smallest[key] = of
    for of in smallest.values():
        leanest_of: dict[tuple[object, ...], PlannedLayout] = {}
        for layout in layouts(space, of):  # recomputation and ZeRO stages are in ascending order of what they save
            leanest_of[layout.schedule, layout.virtual_stages] = layout
        few = [layout for layout in leanest_of.values() if layout.schedule in _LEAN_SCHEDULES]
        yield from few or leanest_of.values()

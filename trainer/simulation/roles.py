"""Traces all ranks of a world by tracing one of each role, the ranks that run the same passes.

Two pipeline ranks have the same role if their stages have layers of the same shapes and exchange the same kinds of messages. They
run the same passes in another order, which the schedule gives. And with many micro-batches, passes repeat: the first of a kind
overwrites gradients, the last starts their reduction, and those between are alike. So a role is traced with few micro-batches, and
the step of each of its ranks is composed of these passes along the real schedule.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TypeAlias

from bagualu.comm.calls import Communication, Waited
from bagualu.parallel.balance.stages.cost import CostTable
from bagualu.parallel.balance.stages.forecast import Split
from bagualu.parallel.layout import Layout, StagePlacement
from bagualu.parallel.pipeline.schedules.schedule import Action, Kind
from bagualu.parallel.simulation.events import Event, RankTrace, Role, Section
from bagualu.trainer.costs.plan_split import plan_split
from bagualu.trainer.models.decoder.shapes import layer_buffers, layer_shapes
from bagualu.trainer.recipe.config import Recipe
from bagualu.trainer.simulation.loads import balanced
from bagualu.trainer.simulation.trace import Traced, schedule_of, trace, traceable

FEW = 3
"""The micro-batches with which a role is traced: the first, one between, and the last."""
_TOWARDS = {Kind.RECEIVE_ACTIVATION: -1, Kind.SEND_ACTIVATION: 1, Kind.RECEIVE_GRADIENT: 1, Kind.SEND_GRADIENT: -1}
"""For each kind of message, whether the other rank holds the next stage (1) or the previous one (-1)."""
Part: TypeAlias = "tuple[object, ...]"
"""What determines the passes of a pipeline rank."""


@dataclass(frozen=True)
class Fold:
    """Ranks of the fold (data x context) with as many micro-batches, and as many rows for their experts."""

    coordinate: int
    """The first of them."""
    count: int
    micro_batches: int


def trace_world(recipe: Recipe, world: int, how: Traced | None = None) -> list[Role]:
    """Traces the step of every rank of a world of `world` ranks: returns a role for each pipeline coordinate and each class of the
    fold. Raises RecipeError if the recipe is wrong for that world or cannot be traced."""
    how, recipe = how or Traced(), traceable(recipe)
    layout = recipe.validate(world)
    classes = folds(recipe, layout, how)
    heaviest = schedule_of(recipe, layout, max(fold.micro_batches for fold in classes))
    split = plan_split(recipe, layout, heaviest)
    return [role for fold in classes for role in _trace_fold(recipe, layout, fold, split, how)]


def _trace_fold(recipe: Recipe, layout: Layout, fold: Fold, split: tuple[Split, CostTable | None], how: Traced) -> Iterator[Role]:
    # Under ZeRO-3 a pass gathers weights for the pass after it, and on a CPU messages begin in other actions: nothing is repeated.
    repeats = recipe.parallel.zero_stage < 3 and how.chip != "cpu"
    traced_with = min(fold.micro_batches, FEW) if repeats else fold.micro_batches
    few = _with_micro_batches(recipe, layout, traced_with)
    schedule, short = (schedule_of(recipe, layout, count) for count in (fold.micro_batches, traced_with))
    found: dict[Part, tuple[RankTrace, list[Action]]] = {}
    for pipeline, part in enumerate(parts(recipe, schedule.placement, split[0])):
        rank = layout.rank(pipeline, fold.coordinate, 0)
        if part not in found or not repeats:
            found[part] = trace(few, layout.world, rank, how, split), short.actions[pipeline]
        composed = compose(*found[part], schedule.actions[pipeline], schedule.placement, rank) if repeats else found[part][0]
        yield Role(composed, fold.count * layout.tensor, pipeline, fold.micro_batches)


def folds(recipe: Recipe, layout: Layout, how: Traced) -> list[Fold]:
    """Returns the classes of ranks of the fold that differ in their work. Raises RecipeError if micro-batches are divided by
    measured speeds."""
    micro_batches = recipe.declared_shares(layout)
    assert micro_batches is not None, "traceable refuses measured shares"
    own = recipe.model.moe.experts // layout.expert
    shares = list(how.shares or balanced(recipe.model.moe.experts)) if own else []
    found: dict[tuple[int, tuple[float, ...]], Fold] = {}
    for coordinate in range(layout.fold):
        expert = coordinate % layout.expert
        key = micro_batches[coordinate // layout.context], tuple(shares[expert * own : (expert + 1) * own])
        first = found.get(key, Fold(coordinate, 0, key[0]))
        found[key] = replace(first, count=first.count + 1)
    return list(found.values())


def parts(recipe: Recipe, placement: StagePlacement, split: Split) -> Iterator[Part]:
    """Yields, for each pipeline rank, what determines its passes: for each of its stages, the shapes of its layers, what these
    compute again, whether it is the first or the last, and in which directions its messages go."""
    model = recipe.model
    for rank in range(placement.ranks):
        stages = placement.stages_of(rank)
        layers = tuple(
            (*layer_shapes(model, layer).items(), *layer_buffers(model, layer).items(), split.recompute[layer])
            for stage in stages
            for layer in split.slices[stage]
        )
        ends = tuple((len(split.slices[stage]), stage == 0, stage == placement.stages - 1) for stage in stages)
        yield layers, ends, tuple(_direction(placement, stage, step) for stage in stages for step in (1, -1))


def _direction(placement: StagePlacement, stage: int, step: int) -> int:
    """Returns whether messages to the next (`step` 1) or previous (-1) stage go to a later rank (1), an earlier rank (-1), or no
    other rank (0)."""
    other, own = placement.neighbour(stage, step), placement.rank_of(stage)
    return 0 if other is None else 1 if other > own else -1


def _with_micro_batches(recipe: Recipe, layout: Layout, micro_batches: int) -> Recipe:
    """Returns the recipe with this number of micro-batches for each data rank."""
    data = replace(recipe.data, global_batch=layout.data * micro_batches * recipe.train.micro_batch)
    return replace(recipe, data=data, parallel=replace(recipe.parallel, shares=None))


def compose(
    traced: RankTrace, program: Sequence[Action], wanted: Sequence[Action], placement: StagePlacement, rank: int
) -> RankTrace:
    """Returns the step of `rank`, whose program is `wanted`, from the sections of a rank of the same role and its `program`.

    Of the actions of a kind and stage, the first is taken from the first, the last from the last, and those between from the second
    in `program`. A block of memory of the result stands for those of several micro-batches. What is outside the program is copied,
    also kernels on a few numbers of which there is one for each micro-batch, such as the count of labels.
    """
    sections = {section.action: section for section in traced.sections if section.action is not None}
    sources, totals = _by_kind(program), {key: len(actions) for key, actions in _by_kind(wanted).items()}
    stages = dict(zip(sorted({key[1] for key in totals}), sorted({key[1] for key in sources}), strict=True))
    done = dict.fromkeys(totals, 0)
    before, after = _around(traced.sections)
    calls = _Renumbered()
    composed = [calls.section(section) for section in before]
    for action in wanted:
        key = action.kind, action.stage
        source = sources[action.kind, stages[action.stage]]
        index = 0 if done[key] == 0 else -1 if done[key] == totals[key] - 1 else 1
        done[key] += 1
        if section := sections.get(source[index]):  # an action without events has none
            towards = _TOWARDS.get(action.kind)
            peer = placement.rank_of(action.stage + towards) if towards else None
            composed.append(calls.section(section, action, peer))
    return RankTrace(rank, composed + [calls.section(section) for section in after], traced.kinds)


class _Renumbered:
    """Copies sections and gives their calls new numbers."""

    def __init__(self) -> None:
        self._numbers: dict[int, int] = {}
        """For the number of a call in the trace, that of its latest copy."""
        self._count = 0

    def section(self, section: Section, action: Action | None = None, peer: int | None = None) -> Section:
        """Returns a copy of a section for `action`; its messages go to or come from `peer`."""
        events = [event for old in section.events if (event := self._copy(old, peer)) is not None]
        return Section(section.phase, action or section.action, events)

    def _copy(self, event: Event, peer: int | None) -> Event | None:
        if isinstance(event, Communication):
            number = self._numbers[event.number] = self._count
            self._count += 1
            return replace(event, number=number, peer=event.peer if peer is None else peer)
        if isinstance(event, Waited):  # for a message that this rank has not sent yet, it waits later or need not wait
            return Waited(self._numbers[event.number]) if event.number in self._numbers else None
        return event


def _by_kind(actions: Sequence[Action]) -> dict[tuple[Kind, int], list[Action]]:
    """Returns the actions of each kind and stage, in order."""
    found: dict[tuple[Kind, int], list[Action]] = {}
    for action in actions:
        found.setdefault((action.kind, action.stage), []).append(action)
    return found


def _around(sections: Sequence[Section]) -> tuple[list[Section], list[Section]]:
    """Returns the sections before the program and those after it."""
    inside = [index for index, section in enumerate(sections) if section.action is not None]
    return list(sections[: inside[0]]), list(sections[inside[-1] + 1 :])

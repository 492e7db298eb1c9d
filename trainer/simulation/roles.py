"""Traces all ranks of a world by tracing one of each role, the ranks that run the same passes.

Two pipeline ranks have the same role if their stages have layers of the same shapes and exchange the same kinds of messages. They
run the same passes in another order, which the schedule gives. And with many micro-batches, passes repeat. So a role is traced with
few micro-batches, and the step of each of its ranks is composed of these passes along the real schedule.
"""

from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from typing import TypeAlias

from bagualu.parallel.balance.stages.cost import CostTable
from bagualu.parallel.balance.stages.forecast import Split
from bagualu.parallel.layout import Layout, StagePlacement
from bagualu.parallel.pipeline.layer_slice import LayerPart
from bagualu.parallel.pipeline.program import Program, programs
from bagualu.parallel.pipeline.schedules.schedule import Action
from bagualu.parallel.simulation.compose import Carried, cases, compose, shorten
from bagualu.parallel.simulation.events import RankTrace, Role
from bagualu.trainer.costs.plan_split import plan_split
from bagualu.trainer.models.decoder.shapes import layer_buffers, layer_shapes
from bagualu.trainer.recipe.config import Recipe
from bagualu.trainer.simulation.loads import by_layer, distinct, in_classes
from bagualu.trainer.simulation.trace import Traced, schedule_of, trace, traceable

Part: TypeAlias = "tuple[object, ...]"
"""What determines the passes of a pipeline rank."""


@dataclass(frozen=True)
class Fold:
    """Ranks of the fold (data x context) with as many micro-batches, and as many rows for their experts."""

    coordinates: tuple[range, ...]
    micro_batches: int

    @property
    def first(self) -> int:
        return self.coordinates[0][0]

    @property
    def count(self) -> int:
        return sum(map(len, self.coordinates))


def trace_world(recipe: Recipe, world: int, how: Traced | None = None) -> list[Role]:
    """Traces the step of every rank of a world of `world` ranks: returns a role for each pipeline coordinate and each class of the
    fold. Raises RecipeError if the recipe is wrong for that world or cannot be traced."""
    recipe, how = traceable(recipe), how or Traced()
    layout = recipe.validate(world)
    how = replace(how, shares=in_classes(by_layer(how.shares, recipe.model), layout.expert))
    classes = folds(recipe, layout, how)
    heaviest = schedule_of(recipe, layout, max(fold.micro_batches for fold in classes))
    split = plan_split(recipe, layout, heaviest)
    return [role for fold in classes for role in _trace_fold(recipe, layout, fold, split, how)]


def _trace_fold(recipe: Recipe, layout: Layout, fold: Fold, split: tuple[Split, CostTable | None], how: Traced) -> Iterator[Role]:
    exact = _with_micro_batches(recipe, layout, fold.micro_batches)
    ranks = [layout.rank(pipeline, fold.first, 0) for pipeline in range(layout.pipeline)]
    if how.chip == "cpu":  # messages begin in other actions there, so that sections do not repeat
        traces = [trace(exact, layout.world, rank, how, split) for rank in ranks]
    else:
        traces = _composed(exact, layout, ranks, split, how)
    for pipeline, traced in enumerate(traces):
        yield Role(traced, fold.count * layout.tensor, pipeline, fold.micro_batches, fold.coordinates)


@dataclass(frozen=True)
class _Source:
    """A trace of which steps are composed."""

    trace: RankTrace
    actions: list[Action]
    """Its program."""
    keys: set[Hashable]
    """Those of the program's cases (`parallel.simulation.compose`)."""


def _composed(
    recipe: Recipe, layout: Layout, ranks: Sequence[int], split: tuple[Split, CostTable | None], how: Traced
) -> list[RankTrace]:
    """Returns the traces of `ranks`, one for each pipeline coordinate, composed of few micro-batches of few ranks."""
    schedule = schedule_of(recipe, layout, max(recipe.declared_shares(layout) or []))
    placement, carried, wanted = schedule.placement, _carried(recipe, split[0]), programs(schedule)
    keys = [{case.key for case in cases(program.actions, placement, carried)} for program in wanted]
    alike = list(parts(recipe, placement, split[0], how))
    sources: dict[Part, list[_Source]] = {}
    chosen: dict[int, _Source] = {}
    for pipeline in sorted(range(layout.pipeline), key=lambda pipeline: -len(keys[pipeline])):
        made = sources.setdefault(alike[pipeline], [])
        source = next((source for source in made if keys[pipeline] <= source.keys), None)
        if source is None:
            actions = shorten(wanted[pipeline].actions, placement, carried)
            few = _with_micro_batches(recipe, layout, 1 + max(action.micro_batch for action in actions))
            traced = trace(few, layout.world, ranks[pipeline], how, split, Program(actions))
            made.append(source := _Source(traced, actions, keys[pipeline]))
        chosen[pipeline] = source
    return [
        compose(chosen[pipeline].trace, chosen[pipeline].actions, program, placement, carried, ranks[pipeline])
        for pipeline, program in enumerate(wanted)
    ]


def _carried(recipe: Recipe, split: Split) -> Carried:
    """Returns what passes leave to later passes."""
    stage, spare = recipe.parallel.zero_stage, split.forecast.spare_bytes if split.forecast else []
    return Carried(gathered=stage == 3, kept=stage == 3 and any(spare), reductions=stage >= 2, parts=stage == 2)


def folds(recipe: Recipe, layout: Layout, how: Traced) -> list[Fold]:
    """Returns the classes of ranks of the fold that differ in their work."""
    declared = recipe.declared_shares(layout)
    assert declared is not None, "traceable refuses measured shares"
    own, shares = recipe.model.moe.experts // layout.expert, distinct(by_layer(how.shares, recipe.model))
    experts: dict[Hashable, list[int]] = {}
    for expert in range(layout.expert):
        here = tuple(tuple(of_layer[expert * own : (expert + 1) * own]) for of_layer in shares.values())
        experts.setdefault(here, []).append(expert)
    found: dict[tuple[int, Hashable], list[range]] = {}
    begin = 0
    for micro_batches, same in groupby(declared):
        end = begin + sum(1 for _ in same) * layout.context
        for shares_of, alike in experts.items():
            ranges = [range(begin + (expert - begin) % layout.expert, end, layout.expert) for expert in alike]
            ranges = [range(begin, end)] if len(alike) == layout.expert else [one for one in ranges if one]
            found.setdefault((micro_batches, shares_of), []).extend(ranges)
        begin = end
    return [Fold(tuple(coordinates), key[0]) for key, coordinates in found.items() if coordinates]


def parts(recipe: Recipe, placement: StagePlacement, split: Split, how: Traced) -> Iterator[Part]:
    """Yields, for each pipeline rank, what determines its passes: for each of its stages, the shapes of its layers, the shares of
    their experts, what they compute again, whether it is the first or the last, and in which directions its messages go; and the
    bytes of gathered weights that the rank may keep."""
    model, spare = recipe.model, split.forecast.spare_bytes if split.forecast else []
    shares = {layer: id(of_layer) for layer, of_layer in by_layer(how.shares, model).items()}
    for rank in range(placement.ranks):
        stages = placement.stages_of(rank)
        held = [(layer, part) for stage in stages for layer, part in split.slices[stage].parts().items()]
        layers = tuple(
            (
                *layer_shapes(model, layer, part).items(),
                *layer_buffers(model, layer, part).items(),
                None if part is LayerPart.ATTENTION else shares.get(layer),
                part.again(split.recompute[layer]),
            )
            for layer, part in held
        )
        ends = tuple((split.slices[stage].count, stage == 0, stage == placement.stages - 1) for stage in stages)
        directions = tuple(_direction(placement, stage, step) for stage in stages for step in (1, -1))
        yield layers, ends, directions, tuple(spare[rank : rank + 1])


def _direction(placement: StagePlacement, stage: int, step: int) -> int:
    """Returns whether messages to the next (`step` 1) or previous (-1) stage go to a later rank (1), an earlier rank (-1), or no
    other rank (0)."""
    other, own = placement.neighbour(stage, step), placement.rank_of(stage)
    return 0 if other is None else 1 if other > own else -1


def _with_micro_batches(recipe: Recipe, layout: Layout, micro_batches: int) -> Recipe:
    """Returns the recipe with this number of micro-batches for each data rank."""
    data = replace(recipe.data, global_batch=layout.data * micro_batches * recipe.train.micro_batch)
    return replace(recipe, data=data, parallel=replace(recipe.parallel, shares=None))

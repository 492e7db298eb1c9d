"""What layouts of a recipe cost on a cluster, for the search of parallel/planner: estimates, memory and exact predictions."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

from bagualu.comm.errors import RecipeError
from bagualu.comm.topology import Cluster
from bagualu.parallel.balance.replicas import shares
from bagualu.parallel.balance.stages.choose import CUT_GAIN
from bagualu.parallel.balance.stages.cost import CostTable, LayerCost, joined
from bagualu.parallel.balance.stages.keys import memory_caps
from bagualu.parallel.balance.stages.partition import GaveUp, solve
from bagualu.parallel.balance.stages.problem import Problem
from bagualu.parallel.layout import StagePlacement
from bagualu.parallel.pipeline.layer_slice import IN_ORDER
from bagualu.parallel.pipeline.registry import compute_schedule, placement_of
from bagualu.parallel.pipeline.split import split_layers
from bagualu.parallel.planner.layouts import Degrees, PlannedLayout, evened
from bagualu.parallel.planner.search import Need, StepParts
from bagualu.trainer.costs.fits import memories
from bagualu.trainer.recipe.changed import changed
from bagualu.trainer.recipe.config import Recipe
from bagualu.trainer.simulation.estimate import Block, StepEstimator
from bagualu.trainer.simulation.fitting_split import fitting_split
from bagualu.trainer.simulation.passes import Division, LayerKind, LayerPasses, kind_of_layer
from bagualu.trainer.simulation.predict import Prediction

_ALIKE = 0.02
"""Layers are divided unevenly only if the slowest rank of an even division takes longer than the mean by more than this part."""
_WORK = 5_000
"""The choices that a search for a division may examine (partition.py). Up to two stages on each rank need fewer; with more, some
searches would take as long as a prediction."""


class LayoutCosts:
    """The `Costs` of one recipe on one cluster, which has as many devices as the world."""

    def __init__(
        self,
        recipe: Recipe,
        estimator: StepEstimator,
        predict: Callable[[Recipe], Prediction],
        choosable: Sequence[str] = ("parallel.balance", "parallel.shares"),
    ) -> None:
        """`choosable`: those of the two keys that `variations` may choose."""
        self.recipe, self.refusal = recipe, ""
        self._estimator, self._predict, self._choosable = estimator, predict, choosable
        self._splits: dict[object, tuple[tuple[float, ...], tuple[float, ...] | None] | None] = {}

    def recipe_of(self, layout: PlannedLayout) -> Recipe:
        """Returns the recipe in this layout."""
        return changed(self.recipe, layout.values())

    def least_seconds(self, of: Degrees) -> float:
        return self._estimator.least_seconds(of)

    def estimate(self, layout: PlannedLayout) -> StepParts:
        return self._estimator.estimate(layout)

    def need(self, layout: PlannedLayout) -> Need | None:
        recipe = self.recipe_of(layout)
        try:
            found = memories(recipe, recipe.validate(self._estimator.world))
        except RecipeError as error:
            self.refusal = str(error)
            return None
        totals = [sum(memory.values()) for memory in found]
        blocks = self._estimator.blocks(layout.degrees.pipeline)
        excess = max(total - block.memory_bytes for total, block in zip(totals, blocks, strict=True))
        return Need(max(totals), excess, sum(totals) / sum(block.memory_bytes for block in blocks))

    def fitted(self, layout: PlannedLayout) -> PlannedLayout | None:
        if layout.degrees.pipeline == 1 or "parallel.balance" not in self._choosable:
            return None
        if (need := self.need(layout)) is None or need.filled > 1:
            return None
        recipe, blocks = self.recipe_of(layout), self._estimator.blocks(layout.degrees.pipeline)
        plain = replace(layout, recompute="none")
        limits = memory_caps(recipe.parallel.memory_bytes, len(blocks)) or [block.memory_bytes for block in blocks]
        limits = [min(limit, block.memory_bytes) for limit, block in zip(limits, blocks, strict=True)]
        split = fitting_split(
            recipe, recipe.validate(self._estimator.world), self._table(plain, blocks[0]), self._speeds(plain, blocks), limits
        )
        return None if split is None else replace(layout, balance=split)

    def variations(self, layout: PlannedLayout) -> Iterator[PlannedLayout]:
        placement = placement_of(layout.schedule, layout.degrees.pipeline, layout.virtual_stages)
        if placement.ranks > 1 and layout.balance == "uniform" and "parallel.balance" in self._choosable:
            if split := self._split(layout, placement):
                yield replace(layout, balance=split)
        elif placement.ranks == 1 and layout.shares is None and "parallel.shares" in self._choosable:
            yield from self._shared(layout)

    def exact(self, layout: PlannedLayout) -> tuple[Prediction, Need]:
        prediction = self._predict(self.recipe_of(layout))
        fullest = prediction.fullest
        return prediction, Need(fullest.peak.bytes, -fullest.spare_bytes)

    def _split(self, layout: PlannedLayout, placement: StagePlacement) -> tuple[float, ...] | None:
        """Returns numbers of layers per stage with which the slowest rank takes less time; None if an even division is as good."""
        blocks = self._estimator.blocks(placement.ranks)
        seconds = [rank.total for rank in self._estimator.rank_passes(layout, placement, blocks)]
        if max(seconds) <= (1 + _ALIKE) * sum(seconds) / len(seconds):
            return None
        key = placement, Division.of(layout.degrees), layout.recompute
        if key not in self._splits:
            self._splits[key] = self._solved(layout, placement, blocks)
        if (solved := self._splits[key]) is None:
            return None
        chosen, inside = solved
        if inside is not None:  # a step also depends on the schedule and the ZeRO stage
            step, whole = (self.estimate(replace(layout, balance=counts)).total for counts in (inside, chosen))
            chosen = inside if step <= whole * (1 - CUT_GAIN) else chosen
        uniform = tuple(one.count for one in split_layers(self.recipe.model.layers, placement))
        return None if chosen == uniform else chosen

    def _solved(
        self, layout: PlannedLayout, placement: StagePlacement, blocks: Sequence[Block]
    ) -> tuple[tuple[float, ...], tuple[float, ...] | None] | None:
        """Returns the best numbers of whole layers and, if they may gain enough, of layers that are cut inside; None if there are
        none."""
        schedule = compute_schedule(layout.schedule, placement.ranks, 1, layout.virtual_stages)
        problem = Problem(self._table(layout, blocks[0]), schedule, self._speeds(layout, blocks), None)

        def slowest(counts: tuple[float, ...]) -> float:
            return max(rank.total for rank in self._estimator.rank_passes(replace(layout, balance=counts), placement, blocks))

        found = _counts(problem)
        if found is None:
            return None
        even = evened(found, placement)
        chosen = even if slowest(even) <= (1 + _ALIKE) * slowest(found) else found
        if slowest(chosen) * (1 - CUT_GAIN) <= problem.even_seconds():
            return chosen, None
        return chosen, _counts(Problem(self._table(layout, blocks[0], halves=True), schedule, problem.speeds, None, halves=True))

    def _speeds(self, layout: PlannedLayout, blocks: Sequence[Block]) -> list[float]:
        """Returns the speeds of the ranks at each coordinate of the pipeline, that of the first being 1."""
        layers = [self._layer_seconds(layout, block) for block in blocks]
        return [layers[0] / each for each in layers]

    def _layer_seconds(self, layout: PlannedLayout, block: Block) -> float:
        """Returns the seconds of all layers for a micro-batch on the chips of `block`."""
        return sum(self._layers(layout, block)[layer].total for layer in range(self.recipe.model.layers))

    def _layers(self, layout: PlannedLayout, block: Block) -> list[LayerPasses]:
        kinds = [kind_of_layer(self.recipe.model, layer) for layer in range(self.recipe.model.layers)]
        parts = self._estimator.recomputed(layout.recompute)
        divisions = [Division.of(layout.degrees, part) for part in parts]
        return [self._estimator.passes(block, *both) for both in zip(divisions, kinds, strict=True)]

    def _halves(self, layout: PlannedLayout, block: Block) -> list[LayerCost]:
        """Returns the times of all layers on the chips of `block`, each the sum of those of its halves."""
        model, layers = self.recipe.model, []
        for layer, recompute in enumerate(self._estimator.recomputed(layout.recompute)):
            divisions = [(part, Division.of(layout.degrees, part.again(recompute))) for part in IN_ORDER]
            passes = [self._estimator.passes(block, division, kind_of_layer(model, layer, part)) for part, division in divisions]
            layers.append(joined(f"layer {layer}", *(_cost(part.value, one) for part, one in zip(IN_ORDER, passes, strict=True))))
        return layers

    def _table(self, layout: PlannedLayout, block: Block, halves: bool = False) -> CostTable:
        """Returns the times of all layers, and of their `halves`, on the chips of `block`, recomputation included."""
        ends = [self._estimator.passes(block, Division.of(layout.degrees), unit) for unit in (LayerKind.FIRST, LayerKind.LAST)]
        embedding, head = (_cost(name, passes) for name, passes in zip(("embedding", "head"), ends, strict=True))
        layers = [_cost(f"layer {i}", passes) for i, passes in enumerate(self._layers(layout, block))]
        return CostTable(embedding, self._halves(layout, block) if halves else layers, head, "traces of single layers")

    def _shared(self, layout: PlannedLayout) -> Iterator[PlannedLayout]:
        """Yields the layout with micro-batches for each data rank in proportion to the speed of its chips, if they differ."""
        of = layout.degrees
        cluster: Cluster = self._estimator.cluster
        if len(cluster.parts) == 1 or of.data == 1 or of.expert > 1 or self._estimator.zero(layout) > 1:
            return
        seconds = [self._layer_seconds(layout, self._estimator.block(d * of.tensor, (d + 1) * of.tensor)) for d in range(of.data)]
        micro_batches = self.recipe.data.global_batch // of.micro_batch
        if len(set(seconds)) > 1 and micro_batches >= of.data:
            yield replace(layout, shares=tuple(shares(micro_batches, [1 / each for each in seconds])))


def _counts(problem: Problem) -> tuple[float, ...] | None:
    """Returns the numbers of layers per stage with which the slowest rank is quickest; None if a short search finds none."""
    try:
        solution = solve(problem, _WORK)
    except GaveUp:
        return None
    return None if solution is None else tuple(problem.slice_of(piece).count for piece in solution.pieces)


def _cost(name: str, passes: LayerPasses) -> LayerCost:
    return LayerCost(name, passes.forward.total, passes.input_gradient.total, passes.weight_gradient.total)

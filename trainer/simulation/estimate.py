"""Estimates the step of a layout without tracing it as a whole, from the passes of single layers (passes.py).

For each micro-batch, a rank's stages take what their layers take, and the messages that they wait for. The pipeline adds its
bubble: by the schedule's published formula or, for schedules in a V, from the schedule itself. Reductions of gradients, the update
and the gathering of weights follow from the elements that a rank holds. The estimate leaves out what the replay of a whole trace
has: how axes share links, and how ranks of different speed come to wait. It only says which layouts are worth predicting.
"""

from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, fields
from functools import cache, lru_cache
from math import ceil
from typing import Any

from bagualu.comm.calls import Communication
from bagualu.comm.cost import CollectiveCost, collective_cost
from bagualu.comm.topology import Chip, Cluster
from bagualu.parallel.balance.stages.activations import read_activations
from bagualu.parallel.layout import Layout, StagePlacement
from bagualu.parallel.pipeline.layer_slice import LayerPart
from bagualu.parallel.pipeline.registry import FAMILIES, compute_schedule, placement_of, splits_backward
from bagualu.parallel.pipeline.schedules.formula import Size
from bagualu.parallel.pipeline.split import split_layers
from bagualu.parallel.pipeline.timeline import per_kind, simulate
from bagualu.parallel.planner.layouts import Degrees, PlannedLayout
from bagualu.parallel.planner.search import StepParts
from bagualu.parallel.simulation.events import Operator
from bagualu.parallel.simulation.step_parts import IN_PIPELINE, OTHER_KERNELS, communication
from bagualu.trainer.costs.state import part_of, rank_parameters
from bagualu.trainer.costs.work import work_of
from bagualu.trainer.recipe.config import Recipe
from bagualu.trainer.simulation.passes import Division, LayerKind, LayerPasses, LayerTraces, kind_of_layer, pass_cost

OperatorSeconds = Callable[[Chip, Operator], float]
_CALLS = {"send": "p2p", "receive": "p2p", "barrier": "all_reduce"}
"""What the calls of a transport are to the cost model, where they have another name there."""
_BESIDE = 0.5
"""The part of the first half of a split backward pass beside which gradients of the second half are reduced."""
_RATIO, _FEW_RANKS = 4, 8
"""Where the bubble of a schedule is timed, ratios of the times of passes are rounded to quarters, and more ranks than this are
taken to wait in proportion to their number, so that few schedules are timed."""


@dataclass(frozen=True)
class Block:
    """The ranks at a coordinate of the pipeline."""

    start: int
    """The first of them, or of another block with the same chips."""
    part: int
    """The part of the cluster with the slowest of their chips."""
    memory_bytes: int
    """What the chip with the least memory has for tensors: without what the driver takes."""


@dataclass
class RankPasses:
    """What the stages of a rank take for a micro-batch, in seconds, without messages."""

    forward: float = 0.0
    input_gradient: float = 0.0
    weight_gradient: float = 0.0
    parts: Counter[str] = field(default_factory=Counter)
    """What all three consist of, by the names of step_parts.py."""
    messages: int = 0
    """The number of messages that the rank receives."""

    @property
    def total(self) -> float:
        return self.forward + self.input_gradient + self.weight_gradient

    def add(self, passes: LayerPasses, layers: int) -> None:
        """Adds a number of layers with these passes."""
        self.forward += layers * passes.forward.total
        self.input_gradient += layers * passes.input_gradient.total
        self.weight_gradient += layers * passes.weight_gradient.total
        for one in (passes.forward, passes.input_gradient, passes.weight_gradient):
            for kind, seconds in one.kernels.items():
                self.parts[kind] += layers * seconds  # type: ignore[assignment]
            for axis, seconds in one.waits.items():
                self.parts[communication(axis)] += layers * seconds  # type: ignore[assignment]


@dataclass(frozen=True)
class Holding:
    """The elements of weights that a rank holds, by the axis over which their gradients are reduced; those beside low-rank factors,
    which are not trained, apart."""

    fold: int = 0
    replica: int = 0
    frozen_fold: int = 0
    frozen_replica: int = 0


class StepEstimator:
    """Estimates steps of one recipe on one cluster, which has as many devices as the world."""

    def __init__(self, recipe: Recipe, cluster: Cluster, world: int, traces: LayerTraces, seconds: OperatorSeconds) -> None:
        self.recipe, self.cluster, self.world = recipe, cluster, world
        self._traces, self._operator_seconds = traces, cache(lambda part, operator: seconds(self._chip(part), operator))
        work = work_of(recipe, Layout())
        self._item_bytes, self._wide_bytes = work.item_bytes, work.accurate_bytes
        self.passes = cache(self._passes)
        self._alike: dict[tuple[int, ...], Block] = {}
        self._blocks, self._counts, self._holdings = cache(self._blocks_of), cache(self._layer_counts), cache(self._holding)
        self._collective, self._ranks = cache(self._collective_of), cache(self._rank_passes)

    def least_seconds(self, of: Degrees) -> float:
        """Returns a lower bound of the estimates of all layouts of these degrees: all passes without recomputation, divided over
        the ranks in proportion to their speed, which never wait for each other."""
        model, division = self.recipe.model, Division.of(of)
        mixtures = sum(map(model.is_moe_layer, range(model.layers)))
        counts = {LayerKind.MIXTURE: mixtures, LayerKind.DENSE: model.layers - mixtures, LayerKind.FIRST: 1, LayerKind.LAST: 1}
        rate = 0.0
        for block in self._blocks(of.pipeline):
            rate += 1 / sum(count * self.passes(block, division, unit).total for unit, count in counts.items() if count)
        return self.micro_batches(of) / rate

    def estimate(self, layout: PlannedLayout) -> StepParts:
        """Returns the estimated seconds of a step of the rank that determines it, by cause."""
        of, blocks = layout.degrees, self._blocks(layout.degrees.pipeline)
        if layout.shares is None:
            return self._estimate(layout, blocks, self.micro_batches(of))
        replicas = {(self.block(d * of.tensor, (d + 1) * of.tensor), share) for d, share in enumerate(layout.shares)}
        steps = [self._estimate(layout, [block] if of.pipeline == 1 else blocks, share) for block, share in replicas]
        return max(steps, key=lambda step: step.total)

    def _estimate(self, layout: PlannedLayout, blocks: Sequence[Block], micro_batches: int) -> StepParts:
        of, zero = layout.degrees, self.zero(layout)
        placement = placement_of(layout.schedule, of.pipeline, layout.virtual_stages)
        ranks, message = self.rank_passes(layout, placement, blocks), self._message(of)
        slowest = max(range(of.pipeline), key=lambda rank: ranks[rank].total + ranks[rank].messages * message)
        own, held = ranks[slowest], self._rank_holding(layout, placement, slowest)
        start = self._blocks(of.pipeline)[slowest].start
        seconds = defaultdict[str, float](float, {part: micro_batches * each for part, each in own.parts.items()})
        gathering, reduction = self._moved(of, start, held, own, zero, splits_backward(layout.schedule))
        besides = {
            communication("pipeline"): micro_batches * own.messages * message,
            IN_PIPELINE: self._bubble(layout, placement, ranks, micro_batches, message),
            OTHER_KERNELS: self._update_seconds(of, blocks[slowest], held, zero),
            communication("fold"): gathering * (micro_batches if zero == 3 else 1)
            + reduction * (micro_batches if zero >= 2 else 1),
        }
        for part, each in besides.items():
            seconds[part] += each
        return StepParts(seconds)

    def micro_batches(self, of: Degrees) -> int:
        """Returns the number of micro-batches of each data rank if all have as many."""
        return self.recipe.data.global_batch // (of.data * of.micro_batch)

    def zero(self, layout: PlannedLayout) -> int:
        return self.recipe.parallel.zero_stage if layout.zero is None else layout.zero

    def blocks(self, pipeline: int) -> Sequence[Block]:
        """Returns the ranks at each coordinate of the pipeline."""
        return self._blocks(pipeline)

    def rank_passes(self, layout: PlannedLayout, placement: StagePlacement, blocks: Sequence[Block]) -> Sequence[RankPasses]:
        """Returns what each pipeline rank takes for a micro-batch."""
        return self._ranks(placement, layout.balance, layout.recompute, layout.degrees, tuple(blocks))

    def _rank_passes(
        self, placement: StagePlacement, balance: Any, recompute: Any, of: Degrees, blocks: tuple[Block, ...]
    ) -> list[RankPasses]:
        found = []
        counts = self._counts(placement, balance, recompute)
        for rank, block in enumerate(blocks):
            passes = RankPasses()
            for stage in placement.stages_of(rank):
                for (unit, part), layers in counts[stage].items():
                    passes.add(self.passes(block, Division.of(of, part), unit), layers)
                passes.messages += sum(placement.neighbour(stage, step) is not None for step in (-1, 1))
            found.append(passes)
        return found

    def recomputed(self, recompute: Any) -> list[str]:
        """Returns what each layer computes again. Where layers are chosen by limits of memory, it assumes all of them."""
        model = self.recipe.model
        mixtures = [model.is_moe_layer(layer) for layer in range(model.layers)]
        parts = read_activations(list(recompute) if isinstance(recompute, tuple) else recompute, 0, mixtures).recompute
        return list(parts or ["full" if parts is None else "none"] * model.layers)

    def _layer_counts(self, placement: StagePlacement, balance: Any, recompute: Any) -> list[Counter[tuple[LayerKind, str]]]:
        """Returns, for each stage, its numbers of layers by kind and recomputed part, with its embedding or head."""
        model, parts = self.recipe.model, self.recomputed(recompute)
        balance = list(balance) if isinstance(balance, tuple) else "uniform"
        counts = []
        for stage, layers in enumerate(split_layers(model.layers, placement, balance)):
            held = layers.parts().items()
            units = Counter((kind_of_layer(model, layer, part), part.again(parts[layer])) for layer, part in held)
            if stage == 0:
                units[LayerKind.FIRST, "none"] += 1
            if stage == placement.stages - 1:
                units[LayerKind.LAST, "none"] += 1
            counts.append(units)
        return counts

    def _passes(self, block: Block, division: Division, unit: LayerKind) -> LayerPasses:
        traced = self._traces.of(division, unit)

        def operator_seconds(operator: Operator) -> float:
            return self._operator_seconds(block.part, operator)

        def call_seconds(call: Communication) -> float:
            stride = 1 if call.group == "tensor" else division.tensor
            return self._collective(_CALLS.get(call.kind, call.kind), call.bytes, block.start, stride, call.size).seconds

        passes = LayerPasses(*(pass_cost(events, operator_seconds, call_seconds) for events in traced.passes.values()))
        if traced.besides is None:
            return passes
        layer = self.passes(block, Division(division.tensor, 1, division.sequence, 1), traced.besides)
        return passes.less(layer).times(division.micro_batch)  # the sequences of a micro-batch take about as long as alone

    def _collective_of(self, kind: str, size_bytes: int, start: int, stride: int, size: int) -> CollectiveCost:
        return collective_cost(self.cluster, kind, size_bytes, range(start, start + size * stride, stride))

    def block(self, start: int, end: int) -> Block:
        """Returns the ranks from `start` to before `end` as a block."""
        touched = tuple(self._parts(start, end))
        if touched not in self._alike:
            slowest = min(touched, key=lambda part: self._chip(part).peak(self.recipe.train.dtype))
            memory_bytes = min(self._chip(part).memory_bytes - self._chip(part).context_bytes for part in touched)
            self._alike[touched] = Block(start, slowest, memory_bytes)
        return self._alike[touched]

    def _chip(self, part: int) -> Chip:
        return self.cluster.parts[part].chip

    def _blocks_of(self, pipeline: int) -> list[Block]:
        size = self.world // pipeline
        return [self.block(rank * size, (rank + 1) * size) for rank in range(pipeline)]

    def _parts(self, start: int, end: int) -> Iterator[int]:
        """Yields the indices of the cluster's parts that hold any of the ranks from `start` to before `end`."""
        first = 0
        for index, part in enumerate(self.cluster.parts):
            last = first + (part.devices or self.world)
            if start < last and end > first:
                yield index
            first = last

    def _message(self, of: Degrees) -> float:
        """Returns the seconds of a message between neighbouring pipeline ranks."""
        if of.pipeline == 1:
            return 0.0
        tokens = of.micro_batch * self.recipe.data.sequence_length // (of.tensor if of.sequence else 1)
        size = tokens * self.recipe.model.hidden * self._item_bytes
        return self._collective("p2p", size, 0, self.world // of.pipeline, 2).seconds

    def _bubble(
        self, layout: PlannedLayout, placement: StagePlacement, ranks: Sequence[RankPasses], micro_batches: int, message: float
    ) -> float:
        """Returns the seconds in which a rank waits for others, if its passes take as long as those of the ranks on average."""
        if placement.ranks == 1:
            return 0.0
        stages = placement.stages
        forward, gradient, weight = (
            sum(getattr(rank, name) for rank in ranks) / stages for name in ("forward", "input_gradient", "weight_gradient")
        )
        size = Size(placement.ranks, placement.chunks, micro_batches, forward + message, gradient + message, weight)
        family = FAMILIES[layout.schedule]
        known = None if family.v_shaped or micro_batches < family.formula.least(placement.ranks) else family.formula.bubble(size)
        if known is not None:
            return float(known)
        few = min(placement.ranks, _FEW_RANKS)
        in_flight = max(1, round(min(micro_batches, 2 * placement.ranks + 1) * few / placement.ranks))
        ratios = (round(_RATIO * float(time) / float(size.forward)) for time in (size.input_gradient, size.weight_gradient))
        bubble = _timed_bubble(layout.schedule, few, placement.chunks, in_flight, *ratios)
        return float(size.forward) * bubble * (placement.ranks - 1) / (few - 1)

    def _rank_holding(self, layout: PlannedLayout, placement: StagePlacement, rank: int) -> Holding:
        units = Counter[LayerKind]()
        counts = self._counts(placement, layout.balance, layout.recompute)
        for stage in placement.stages_of(rank):
            for (unit, _), layers in counts[stage].items():
                units[unit] += layers
        held = {unit: self._holdings(unit, layout.degrees.tensor, layout.degrees.expert) for unit in units}
        return Holding(*(sum(n * getattr(held[unit], field.name) for unit, n in units.items()) for field in fields(Holding)))

    def _holding(self, unit: LayerKind, tensor: int, expert: int) -> Holding:
        """Returns the elements that a rank holds of a layer of this kind, the embedding or the head."""
        model = self.recipe.model
        work = work_of(self.recipe, Layout(data=expert, tensor=tensor, expert=expert))
        every = ((layer, part) for layer in range(model.layers) for part in LayerPart)
        found = next((one for one in every if kind_of_layer(model, *one) is unit), None)
        elements = Counter[str]()
        for name, shape, _ in rank_parameters(work, dict.fromkeys(range(model.layers), LayerPart.WHOLE)):
            prefix = f"layers.{found[0]}." if found else {LayerKind.FIRST: "embedding.", LayerKind.LAST: "head."}[unit]
            if name.startswith(prefix) and (found is None or found[1].holds(name.removeprefix(prefix))):
                apart = "" if model.lora.trains(name) else "frozen_"
                elements[apart + work.plan.placement(name).reduction_axis] += part_of(work, name, shape).elements
        return Holding(**elements)

    def _moved(self, of: Degrees, start: int, held: Holding, own: RankPasses, zero: int, split: bool) -> tuple[float, float]:
        """Returns the seconds in which a rank waits for the gathering of weights and the reduction of gradients: in a step or,
        where a ZeRO stage does it for each micro-batch, in a micro-batch. `start`: the first rank at its pipeline coordinate.
        `split`: whether backward passes are split."""
        fold, replica = (of.tensor, of.data), (of.tensor * of.expert, of.data // of.expert)
        trained = ((held.fold, *fold), (held.replica, *replica))
        frozen = ((held.frozen_fold, *fold), (held.frozen_replica, *replica)) if zero == 3 else ()
        reduced = sum(self._buckets("reduce_scatter", n * self._wide_bytes, start, *axis) for n, *axis in trained)
        gathered = sum(self._buckets("all_gather", n * self._item_bytes, start, *axis) for n, *axis in (*trained, *frozen))
        layers = max(1, self.recipe.model.layers // of.pipeline)
        backward = own.weight_gradient + own.input_gradient * (_BESIDE if split else 1)
        if zero == 3:  # beside the passes, but for the first layer that gathers and the last that reduces
            forward_late = max(gathered / layers, gathered - own.forward)
            backward_late = max((gathered + reduced) / layers, gathered + reduced - backward)
            late, moved = forward_late + backward_late, 2 * gathered + reduced or 1.0
            return late * 2 * gathered / moved, late * reduced / moved
        return gathered, max(reduced / layers, reduced - backward)

    def _buckets(self, kind: str, size_bytes: int, start: int, stride: int, size: int) -> float:
        """Returns the seconds of a collective on all elements of a rank, bucket by bucket."""
        if not size_bytes or size == 1:
            return 0.0
        cost = self._collective(kind, size_bytes, start, stride, size)
        return ceil(size_bytes / self.recipe.parallel.bucket_bytes) * cost.latency_seconds + cost.transfer_seconds

    def _update_seconds(self, of: Degrees, block: Block, held: Holding, zero: int) -> float:
        """Returns the seconds of the update, whose kernels move as many bytes for an element as in the trace of a dense layer."""
        unit = LayerKind.DENSE if not self.recipe.model.is_moe_layer(0) or self.recipe.model.moe.every > 1 else LayerKind.MIXTURE
        division = Division(of.tensor, 1, of.sequence, of.micro_batch)
        traced, layer = self._traces.of(division, unit), self._holdings(unit, of.tensor, 1)
        own = held.fold / (of.data if zero else 1) + held.replica / (of.data // of.expert if zero else 1)
        return own * traced.update_bytes / max(1, layer.fold + layer.replica) / self._chip(block.part).memory_bytes_per_second


@lru_cache(maxsize=2**14)
def _timed_bubble(name: str, ranks: int, chunks: int, micro_batches: int, gradient: int, weight: int) -> float:
    """Returns the time in which no rank of the schedule computes until the last pass ends, if a forward pass takes 1 and the parts
    of the backward pass `gradient` and `weight` / _RATIO."""
    schedule = compute_schedule(name, ranks, micro_batches, chunks)
    times = 1.0, gradient / _RATIO, weight / _RATIO
    return float(simulate(schedule, per_kind(*times)).end) - micro_batches * chunks * sum(times)

"""Computes the time and memory of any split of a model's layers over the stages of a schedule."""

from bisect import bisect_left
from collections.abc import Sequence
from copy import copy
from dataclasses import dataclass
from itertools import accumulate
from operator import attrgetter
from typing import NamedTuple

from bagualu.parallel.balance.stages.activations import ALL_KEPT, Activations
from bagualu.parallel.balance.stages.cost import CostTable, LayerCost
from bagualu.parallel.balance.stages.memory import Moment, worst_moments, worst_passes
from bagualu.parallel.pipeline.layer_slice import HALVES, IN_ORDER, LayerPart, LayerSlice
from bagualu.parallel.pipeline.schedules.schedule import Kind, Schedule

_NOTHING: frozenset[int] = frozenset()
Piece = tuple[int, int]
"""The units of a stage: piece[0] to piece[1] - 1. Units are layers or, where stages may begin inside a layer, half layers."""


@dataclass(frozen=True)
class RankCost:
    """The cost of all stages of a rank for a single micro-batch: seconds for all its passes, without waiting."""

    stage_seconds: tuple[float, ...]
    """The time of each stage, at the rank's own speed."""
    chosen: frozenset[int]
    """The units that were chosen to recompute all their activations."""

    @property
    def seconds(self) -> float:
        return sum(self.stage_seconds)


@dataclass(frozen=True)
class StageTimes:
    """The times of a stage at the speed of its rank, in seconds per micro-batch."""

    forward: float
    input_gradient: float
    """Time to compute the gradient of the stage's input, including the second forward pass if activations are recomputed."""
    weight_gradient: float

    @property
    def total(self) -> float:
        return self.forward + self.input_gradient + self.weight_gradient


@dataclass(frozen=True)
class _Held:
    """Bytes of memory that a micro-batch takes at a stage."""

    activations: int
    """Until its B or I is done, with the stage's output."""
    operands: int
    """Operands of the weight gradients, from I to W."""
    more: int
    """Beyond `activations`, for a moment of its B or I, or of the head's forward pass, after which B or I comes next."""
    movable: int
    """The part of `activations` that may be in host memory: what decoder layers keep."""
    largest: int
    """The most of `activations` that belongs to one layer."""


class _Part(NamedTuple):
    """A layer of a stage, or the half of it that the stage holds."""

    cost: LayerCost
    recompute: str
    """What of it is computed again."""
    units: tuple[int, ...]


class Problem:
    """Computes the costs of splits. `speeds` are by rank, relative to the device of the cost table; `caps` are bytes of memory by
    rank, or None for no limit. `halves`: the units of pieces are half layers, not layers.

    If `activations` leaves the layers that recompute to choice, a rank recomputes no more than its limits require.
    """

    def __init__(
        self,
        table: CostTable,
        schedule: Schedule,
        speeds: Sequence[float],
        caps: Sequence[int] | None,
        activations: Activations = ALL_KEPT,
        halves: bool = False,
    ) -> None:
        self.schedule, self.placement, self.halves = schedule, schedule.placement, halves
        self.speeds, self.caps, self.activations = list(speeds), None if caps is None else list(caps), activations
        self.moments, self.passes = worst_moments(schedule), worst_passes(schedule)
        self._splits = any(action.kind == Kind.INPUT_GRADIENT for actions in schedule.actions for action in actions)
        self.stages_of = [self.placement.stages_of(rank) for rank in range(self.placement.ranks)]
        self._take(table)

    def with_table(self, table: CostTable) -> "Problem":
        """Returns the same problem with the costs of `table`."""
        other = copy(self)
        other._take(table)
        return other

    def with_halves(self) -> "Problem":
        """Returns the same problem in half layers."""
        return Problem(self.table, self.schedule, self.speeds, self.caps, self.activations, halves=True)

    def _take(self, table: CostTable) -> None:
        self.table = table
        self._costs = [half for layer in table.layers for half in layer.halves] if self.halves else table.layers
        self.units = len(self._costs)
        self._sums = {
            name: list(accumulate(map(attrgetter(name), self._costs), initial=0))
            for name in ("forward_seconds", "input_gradient_seconds", "weight_gradient_seconds", "state_bytes", "operand_bytes")
        }
        self._again = [cost.again_seconds(self._alone(i, _NOTHING)) for i, cost in enumerate(self._costs)]
        self._sums["again"] = list(accumulate(self._again, initial=0))
        self._known: dict[tuple[int, tuple[Piece, ...]], RankCost | None] = {}

    def pieces(self, slices: Sequence[LayerSlice]) -> list[Piece]:
        """Returns the pieces that are these slices, which must be of whole layers if the units are."""
        assert self.halves or all(one.whole for one in slices)
        per_unit = 1 if self.halves else HALVES
        return [(one.start // per_unit, one.stop // per_unit) for one in slices]

    def slice_of(self, piece: Piece) -> LayerSlice:
        """Returns the slice of the model that is `piece`."""
        return LayerSlice(*piece) if self.halves else LayerSlice.of_layers(range(*piece))

    def recompute(self, chosen: frozenset[int]) -> list[str]:
        """Returns what each layer computes again, given the units that are `chosen` to."""
        return [self._recompute(layer, chosen) for layer in range(len(self.table.layers))]

    def recomputing(self, recompute: Sequence[str]) -> frozenset[int]:
        """Returns the units that are chosen if the layers compute `recompute` again."""
        return frozenset(unit for unit in range(self.units) if self._part_of(unit).again(recompute[self._layer_of(unit)]) == "full")

    def _layer_of(self, unit: int) -> int:
        return unit // HALVES if self.halves else unit

    def _part_of(self, unit: int) -> LayerPart:
        return IN_ORDER[unit % HALVES] if self.halves else LayerPart.WHOLE

    def _recompute(self, layer: int, chosen: frozenset[int]) -> str:
        """Returns what `layer` computes again, given the units that are `chosen` to."""
        if self.activations.recompute is not None or not self.halves:
            return self.activations.of_layer(layer, chosen)
        attention, feed_forward = (unit in chosen for unit in (HALVES * layer, HALVES * layer + 1))
        return "full" if attention and feed_forward else "attention" if attention else "experts" if feed_forward else "none"

    def _alone(self, unit: int, chosen: frozenset[int]) -> str:
        """Returns what `unit` computes again if the rest of its layer is elsewhere."""
        return self._part_of(unit).again(self._recompute(self._layer_of(unit), chosen))

    def _parts(self, piece: Piece, chosen: frozenset[int]) -> list[_Part]:
        """Returns the layers of `piece`, and the half layers at its ends."""
        if not self.halves:
            return [_Part(self.table.layers[i], self.activations.of_layer(i, chosen), (i,)) for i in range(*piece)]
        found = []
        for layer, part in LayerSlice(*piece).parts().items() if piece[0] < piece[1] else ():
            first = HALVES * layer + (part is LayerPart.FEED_FORWARD)
            units = (first, first + 1) if part is LayerPart.WHOLE else (first,)
            found.append(_Part(self.table.layers[layer].part(part), part.again(self._recompute(layer, chosen)), units))
        return found

    def kept_bytes(self, piece: Piece) -> list[int]:
        """Returns the bytes of activations that each layer, or half layer at an end, of `piece` keeps of a micro-batch."""
        return [part.cost.kept_bytes(part.recompute) for part in self._parts(piece, _NOTHING)]

    def least_seconds(self) -> list[float]:
        """Returns the least possible time of all passes of each unit for a micro-batch, in seconds at speed 1.0."""
        return [again + cost.forward_seconds + cost.input_gradient_seconds + cost.weight_gradient_seconds
                for again, cost in zip(self._again, self._costs, strict=True)]  # fmt: skip

    def even_seconds(self) -> float:
        """Returns a lower bound of the bottleneck of any split: the time per micro-batch that ranks take which are equally busy."""
        edges = sum(self.edge_seconds(rank) for rank in range(self.placement.ranks))
        return (sum(self.least_seconds()) + edges) / sum(self.speeds)

    def edge_seconds(self, rank: int) -> float:
        """Returns the seconds per micro-batch, at speed 1.0, of all passes of the embedding and the head if `rank` holds them."""
        edges = [self.table.embedding] * (0 in self.stages_of[rank])
        edges += [self.table.head] * (self.placement.stages - 1 in self.stages_of[rank])
        return sum(edge.forward_seconds + edge.input_gradient_seconds + edge.weight_gradient_seconds for edge in edges)

    def stage_times(self, stage: int, piece: Piece, chosen: frozenset[int] = _NOTHING) -> StageTimes:
        """Returns the times of `stage` if it holds the units `piece`, of which those `chosen` recompute all their activations."""
        again = self._units("again", piece)
        again += sum(self._costs[i].forward_seconds - self._again[i] for i in chosen if piece[0] <= i < piece[1])
        forward, gradient = self._sum("forward_seconds", stage, piece), self._sum("input_gradient_seconds", stage, piece) + again
        speed = self.speeds[self.placement.rank_of(stage)]
        return StageTimes(forward / speed, gradient / speed, self._sum("weight_gradient_seconds", stage, piece) / speed)

    def cost(self, rank: int, pieces: tuple[Piece, ...]) -> RankCost | None:
        """Returns the cost of `rank` for `pieces`, those of its stages in order; None if they do not fit its limits, whatever is
        recomputed."""
        key = (rank, pieces)
        if key not in self._known:
            chosen = self._choose(rank, pieces)
            self._known[key] = None if chosen is None else RankCost(self._seconds(rank, pieces, chosen), chosen)
        return self._known[key]

    def memory(self, rank: int, pieces: tuple[Piece, ...], chosen: frozenset[int] = _NOTHING) -> int:
        """Returns the peak memory of `rank` in bytes: state, `transient_bytes` and what the table reserves."""
        stages = self.stages_of[rank]
        total = sum(self._sum("state_bytes", stage, piece) for stage, piece in zip(stages, pieces, strict=True))
        if {0, self.placement.stages - 1} <= set(stages):
            total -= self.table.tied_bytes
        reserved = self.table.reserved_bytes[rank] if self.table.reserved_bytes else 0
        return int(total) + reserved + self.transient_bytes(rank, pieces, chosen)

    def transient_bytes(
        self,
        rank: int,
        pieces: tuple[Piece, ...],
        chosen: frozenset[int] = _NOTHING,
        passes: list[tuple[int, Moment]] | None = None,
    ) -> int:
        """Returns the most bytes of device memory that `rank` takes besides its state: activations and operands of weight gradients
        in flight, outputs of stages, and what a pass takes beyond those of its own micro-batch. `passes`: as `worst_passes` returns
        them, those to consider; None: all."""
        held = [self._held(*both, chosen) for both in zip(self.stages_of[rank], pieces, strict=True)]
        return self._most(rank, held, self.passes[rank] if passes is None else passes)

    def activation_bytes(self, rank: int, pieces: tuple[Piece, ...], chosen: frozenset[int] = _NOTHING) -> int:
        """Returns the part of `transient_bytes` that `activations.most_bytes` limits: without outputs of stages, gradients and
        intermediate results."""
        held = [self._held(*both, chosen, alone=True) for both in zip(self.stages_of[rank], pieces, strict=True)]
        return self._most(rank, held, self.passes[rank])

    def _most(self, rank: int, held: list[_Held], passes: list[tuple[int, Moment]]) -> int:
        """Returns the most bytes that `rank` takes at a time, in any of `passes` or between them, if its stages take `held` for
        each micro-batch."""

        def at(moment: Moment) -> int:
            pairs = list(zip(moment, held, strict=True))
            total = sum(a * one.activations + o * one.operands for (a, o), one in pairs)
            return total - self._in_host_memory([(a, one) for (a, _), one in pairs])

        return max([*map(at, self.moments[rank]), *(at(moment) + held[chunk].more for chunk, moment in passes)])

    def least_bytes(self, rank: int, pieces: tuple[Piece, ...]) -> tuple[int, int]:
        """Returns `memory` and `activation_bytes` if all units recompute that may be chosen to."""
        chosen = _NOTHING if self.activations.recompute is not None else frozenset(i for piece in pieces for i in range(*piece))
        return self.memory(rank, pieces, chosen), self.activation_bytes(rank, pieces, chosen)

    def least_memory(self, rank: int) -> list[float]:
        """Returns, for each unit, the least memory, in bytes, that it adds to `rank`, whichever of the rank's stages holds it and
        without what is in host memory."""
        fullest = max(self.moments[rank], key=lambda moment: sum(activations for activations, _ in moment))
        held, everything = min(activations for activations, _ in fullest), frozenset(range(self.units))
        return [cost.state_bytes + held * self._least_kept(i, everything) for i, cost in enumerate(self._costs)]

    def _least_kept(self, unit: int, chosen: frozenset[int]) -> int:
        again, cost, part = self._recompute(self._layer_of(unit), chosen), self._costs[unit], self._part_of(unit)
        if part is LayerPart.FEED_FORWARD and again == "full":
            return 0  # of a whole layer only its input is kept, which its attention has
        return min(cost.kept_bytes(part.again(again)), cost.activation_bytes)

    def _choose(self, rank: int, pieces: tuple[Piece, ...]) -> frozenset[int] | None:
        """Returns the units of `pieces` that must be chosen to recompute so that `rank` keeps to its limits; None if it cannot.

        Layers come in the order of the bytes that they free per second of recomputation, and among equal layers the first come
        first: what they compute again needs memory only when the activations of later layers are gone. So the recomputation takes
        at most one layer's forward pass longer than the best choice.
        """
        if self._fits(rank, pieces, _NOTHING):
            return _NOTHING
        if self.activations.recompute is not None:
            return None
        fullest = max(self.moments[rank], key=lambda moment: sum(activations for activations, _ in moment))
        worth = {}
        for (held, _), piece in zip(fullest, pieces, strict=True):
            for cost, _, units in self._parts(piece, _NOTHING):
                worth[units] = held * (cost.activation_bytes - cost.input_bytes) / max(cost.forward_seconds, 1e-300)
        order = sorted(worth, key=lambda units: (-worth[units], units))

        def first(count: int) -> frozenset[int]:
            return frozenset(unit for units in order[:count] for unit in units)

        count = bisect_left(range(1, len(order) + 1), True, key=lambda count: self._fits(rank, pieces, first(count)))
        return first(count + 1) if count < len(order) else None

    def _in_host_memory(self, held: list[tuple[int, _Held]]) -> int:
        """Returns the bytes of activations that are in host memory when `held` micro-batches are in flight at the rank's stages.

        Two layers are on the device: one that computes and one on its way. If a single micro-batch is in flight, these are its last
        layers, which are the last to leave; else they come back from the host.
        """
        most, movable = self.activations.offload_bytes, sum(count * one.movable for count, one in held)
        two = 2 * max(one.largest for _, one in held)
        alone = sum(count for count, _ in held) == 1
        return min(most, max(0, movable - two)) if alone else max(0, min(most, movable) - two)

    def _fits(self, rank: int, pieces: tuple[Piece, ...], chosen: frozenset[int]) -> bool:
        most = self.activations.most_bytes
        if most is not None and self.activation_bytes(rank, pieces, chosen) > most:
            return False
        return self.caps is None or self.memory(rank, pieces, chosen) <= self.caps[rank]

    def _seconds(self, rank: int, pieces: tuple[Piece, ...], chosen: frozenset[int]) -> tuple[float, ...]:
        return tuple(
            self.stage_times(stage, piece, chosen).total for stage, piece in zip(self.stages_of[rank], pieces, strict=True)
        )

    def _held(self, stage: int, piece: Piece, chosen: frozenset[int], alone: bool = False) -> _Held:
        """`alone`: only activations and operands, without what is taken besides them."""
        first, last = stage == 0, stage == self.placement.stages - 1
        embedding, head, besides = self.table.embedding, self.table.head, not alone
        layers = [(cost, recompute) for cost, recompute, _ in self._parts(piece, chosen)]
        sizes = [layer.kept_bytes(recompute) for layer, recompute in layers]
        below = first * embedding.activation_bytes + sum(sizes)
        kept = below + last * head.activation_bytes
        highest, operands = last * (kept + besides * head.work_bytes), 0
        for (layer, recompute), size in zip(reversed(layers), reversed(sizes), strict=True):
            below -= size
            working = layer.working_bytes(recompute) + besides * layer.work_bytes
            highest = max(highest, below + working + operands)  # the pass of the layer, after those above
            operands += layer.operand_bytes if self._splits else 0
        highest = max(highest, first * (below + besides * embedding.work_bytes + operands))
        movable = sum(sizes) - (layers[0][0].input_bytes if not first and layers else 0)  # the pipeline holds the stage's input
        output = 0 if last else besides * self.table.output_bytes
        operands = int(self._sum("operand_bytes", stage, piece))
        return _Held(kept + output, operands, max(0, highest - kept), movable, max(sizes, default=0))

    def _units(self, name: str, piece: Piece) -> float:
        sums: list[float] = self._sums[name]
        return sums[piece[1]] - sums[piece[0]]

    def _sum(self, name: str, stage: int, piece: Piece) -> float:
        total = self._units(name, piece)
        if stage == 0:
            total += getattr(self.table.embedding, name)
        if stage == self.placement.stages - 1:
            total += getattr(self.table.head, name)
        return total

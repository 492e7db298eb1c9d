"""Computes the time and memory of any split of a model's layers over the stages of a schedule."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, product
from operator import attrgetter

from bagualu.parallel.balance.stages.cost import CostTable
from bagualu.parallel.balance.stages.memory import worst_moments
from bagualu.parallel.pipeline.schedules.schedule import Schedule

RECOMPUTE = ("none", "full", "auto")
Piece = tuple[int, int]
"""The layers of a stage: piece[0] to piece[1] - 1."""


@dataclass(frozen=True)
class RankCost:
    """The cost of all stages of a rank for a single micro-batch: seconds for all its passes, without waiting."""

    stage_seconds: tuple[float, ...]
    """The time of each stage, at the rank's own speed."""
    recompute: tuple[bool, ...]
    """For each stage, whether it recomputes activations."""

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


class Problem:
    """Computes the costs of splits. `speeds` are by rank, relative to the device of the cost table; `caps` are bytes of memory by
    rank, or None for no limit.

    `recompute` is none, full or auto. With auto, stages recompute activations only if the rank's cap requires it, in the fastest
    combination that fits.
    """

    def __init__(
        self, table: CostTable, schedule: Schedule, speeds: Sequence[float], caps: Sequence[int] | None, recompute: str = "none"
    ) -> None:
        self.table, self.schedule, self.placement = table, schedule, schedule.placement
        self.layers = len(table.layers)
        self.speeds, self.caps, self.recompute = list(speeds), None if caps is None else list(caps), recompute
        self.moments = worst_moments(schedule)
        self.stages_of = [self.placement.stages_of(rank) for rank in range(self.placement.ranks)]
        self._sums = {
            name: list(accumulate(map(attrgetter(name), table.layers), initial=0))
            for name in ("forward_seconds", "input_gradient_seconds", "weight_gradient_seconds",
                         "state_bytes", "activation_bytes", "input_bytes", "operand_bytes")
        }  # fmt: skip
        self._known: dict[tuple[int, tuple[Piece, ...]], RankCost | None] = {}

    def least_seconds(self) -> list[float]:
        """Returns the least possible time of all passes of each layer for a micro-batch, in seconds at speed 1.0."""
        again = self.recompute == "full"
        return [(1 + again) * layer.forward_seconds + layer.input_gradient_seconds + layer.weight_gradient_seconds
                for layer in self.table.layers]  # fmt: skip

    def edge_seconds(self, rank: int) -> float:
        """Returns the seconds per micro-batch, at speed 1.0, of all passes of the embedding and the head if `rank` holds them."""
        edges = [self.table.embedding] * (0 in self.stages_of[rank])
        edges += [self.table.head] * (self.placement.stages - 1 in self.stages_of[rank])
        return sum(edge.forward_seconds + edge.input_gradient_seconds + edge.weight_gradient_seconds for edge in edges)

    def stage_times(self, stage: int, piece: Piece, again: bool) -> StageTimes:
        """Returns the times of `stage` if it holds the layers `piece`; `again` says whether the stage recomputes activations."""
        forward = self._sum("forward_seconds", stage, piece)
        gradient = self._sum("input_gradient_seconds", stage, piece) + again * self._layers("forward_seconds", piece)
        speed = self.speeds[self.placement.rank_of(stage)]
        return StageTimes(forward / speed, gradient / speed, self._sum("weight_gradient_seconds", stage, piece) / speed)

    def cost(self, rank: int, pieces: tuple[Piece, ...]) -> RankCost | None:
        """Returns the cost of `rank` for `pieces`, the layers of its stages in order, with the fastest allowed recomputation that
        fits; None if none fits the rank's memory cap."""
        key = (rank, pieces)
        if key not in self._known:
            costs = [RankCost(self._seconds(rank, pieces, way), way) for way in self.ways(len(pieces))]
            costs.sort(key=lambda cost: (cost.seconds, sum(cost.recompute)))
            self._known[key] = next((cost for cost in costs if self._fits(rank, pieces, cost.recompute)), None)
        return self._known[key]

    def memory(self, rank: int, pieces: tuple[Piece, ...], recompute: tuple[bool, ...]) -> int:
        """Returns the peak memory of `rank` in bytes: state, activations and operands in flight, and the recomputed activations of
        the layer where they are largest."""
        stages = self.stages_of[rank]
        total = sum(self._sum("state_bytes", stage, piece) for stage, piece in zip(stages, pieces, strict=True))
        if {0, self.placement.stages - 1} <= set(stages):
            total -= self.table.tied_bytes
        held = [self._held(stage, piece, again) for stage, piece, again in zip(stages, pieces, recompute, strict=True)]
        peak = max(
            sum(a * activations + o * operands for (a, o), (activations, operands) in zip(moment, held, strict=True))
            for moment in self.moments[rank]
        )
        again = [self.table.layers[i] for piece, yes in zip(pieces, recompute, strict=True) if yes for i in range(*piece)]
        return int(total + peak + max((layer.activation_bytes - layer.input_bytes for layer in again), default=0))

    def least_memory(self, rank: int) -> list[float]:
        """Returns, for each layer, the least memory, in bytes, that it adds to `rank`, whichever of the rank's stages holds it."""
        fullest = max(self.moments[rank], key=lambda moment: sum(activations for activations, _ in moment))
        held = min(activations for activations, _ in fullest)
        kept = attrgetter("activation_bytes" if self.recompute == "none" else "input_bytes")
        return [layer.state_bytes + held * min(kept(layer), layer.activation_bytes) for layer in self.table.layers]

    def ways(self, stages: int) -> list[tuple[bool, ...]]:
        """Returns the allowed combinations of recomputation for a rank's stages: for each stage, whether it recomputes."""
        if self.recompute == "auto" and self.caps is not None:
            return list(product((False, True), repeat=stages))
        return [(self.recompute == "full",) * stages]

    def _fits(self, rank: int, pieces: tuple[Piece, ...], recompute: tuple[bool, ...]) -> bool:
        return self.caps is None or self.memory(rank, pieces, recompute) <= self.caps[rank]

    def _seconds(self, rank: int, pieces: tuple[Piece, ...], recompute: tuple[bool, ...]) -> tuple[float, ...]:
        return tuple(self.stage_times(*stage).total for stage in zip(self.stages_of[rank], pieces, recompute, strict=True))

    def _held(self, stage: int, piece: Piece, again: bool) -> tuple[int, int]:
        """Returns the bytes of memory that a micro-batch takes at a stage: (activations, operands of the weight gradient)."""
        edges = self._sum("activation_bytes", stage, piece) - self._layers("activation_bytes", piece)
        kept = self._layers("input_bytes" if again else "activation_bytes", piece)
        return int(edges + kept), int(self._sum("operand_bytes", stage, piece))

    def _layers(self, name: str, piece: Piece) -> float:
        sums: list[float] = self._sums[name]
        return sums[piece[1]] - sums[piece[0]]

    def _sum(self, name: str, stage: int, piece: Piece) -> float:
        total = self._layers(name, piece)
        if stage == 0:
            total += getattr(self.table.embedding, name)
        if stage == self.placement.stages - 1:
            total += getattr(self.table.head, name)
        return total

"""Predicts a training step on a described cluster: the trainer's own step, traced once for each kind of rank and replayed with the
times that the cluster's figures give.
"""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

from bagualu.comm.topology import Chip, Cluster
from bagualu.parallel.layout import Layout
from bagualu.parallel.simulation.events import Operator
from bagualu.parallel.simulation.operator_cost import operator_seconds
from bagualu.parallel.simulation.replay import MemoryMoment, Replayed, ReplayedRole, replay
from bagualu.parallel.simulation.step_parts import FOR_OTHERS, FOR_STRAGGLERS, IN_PIPELINE, communication
from bagualu.trainer.models.decoder.flops import model_flops_per_token
from bagualu.trainer.recipe.config import Recipe
from bagualu.trainer.simulation.loads import Shares
from bagualu.trainer.simulation.results import Results
from bagualu.trainer.simulation.roles import trace_world
from bagualu.trainer.simulation.setting import chip_type, on_cluster
from bagualu.trainer.simulation.trace import Traced

Spans: TypeAlias = Literal["calls", "operators"] | None
"""What of the streams to keep, as for `replay`."""


@dataclass(frozen=True)
class RankMemory:
    """The most memory that the ranks at a coordinate of the pipeline take: of their roles, that with least to spare."""

    pipeline: int
    peak: MemoryMoment
    """The fullest moment: bytes of tensors, by kind, and what the rank does then."""
    chip: Chip
    """Theirs: on a mixed cluster, ranks at one coordinate may have different chips."""

    @property
    def limit_bytes(self) -> int:
        """What the chip has for tensors: its memory without what the driver takes."""
        return self.chip.memory_bytes - self.chip.context_bytes

    @property
    def spare_bytes(self) -> int:
        """What is left; less than 0: what is missing."""
        return self.limit_bytes - self.peak.bytes

    @property
    def moment(self) -> str:
        """What the rank does at the fullest moment, e.g. "F3 of stage 0"."""
        section = self.peak.section
        return str(section.action) if section.action is not None else section.phase


@dataclass(frozen=True)
class Prediction:
    """A step of a recipe on a cluster."""

    recipe: Recipe
    """As it was predicted: with the backend of the cluster."""
    cluster: Cluster
    """With exactly the devices of the world."""
    layout: Layout
    replayed: Replayed
    stragglers: float
    """The standard deviation of the ranks' times, as a fraction."""
    tokens: int
    """Of a step, over all ranks."""
    peak_flops_per_second: float
    """Of all devices together, for matrix products of the dtype in which weights are stored."""
    model_flops: float
    """Of a step, as models/decoder/flops.py counts them: without recomputation."""
    executed_flops: float
    """Of the products of all ranks in a step, with what is computed again."""
    memory: Sequence[RankMemory]
    """Of each coordinate of the pipeline, in order."""

    @property
    def step_seconds(self) -> float:
        return self.replayed.step_seconds

    @property
    def tokens_per_second_per_device(self) -> float:
        return self.tokens / self.step_seconds / self.layout.world

    @property
    def mfu(self) -> float:
        return self.model_flops / self.step_seconds / self.peak_flops_per_second

    @property
    def hfu(self) -> float:
        return self.executed_flops / self.step_seconds / self.peak_flops_per_second

    @property
    def slowest_pace(self) -> float:
        """How many times as long as the mean rank the slowest computes."""
        return max(role.pace for role in self.replayed.roles)

    @property
    def fullest(self) -> RankMemory:
        """The memory of the ranks that have least to spare."""
        return min(self.memory, key=lambda memory: memory.spare_bytes)

    @property
    def fits(self) -> bool:
        return self.fullest.spare_bytes >= 0

    def parts(self) -> dict[str, float]:
        """Returns the seconds of the parts of a step (step_parts.py), the mean of all ranks: they add up to the step."""
        mean = self.replayed.mean
        kinds = sorted({kind for role in self.replayed.roles for kind in role.operators})
        computed = {kind: mean(lambda role, kind=kind: role.operators.get(kind, 0.0)) for kind in kinds}  # type: ignore[misc]
        exposed = defaultdict[str, float](float)
        for group, seconds in self.replayed.exposed().items():
            exposed[communication(group)] += seconds
        waits = {IN_PIPELINE: mean(lambda role: role.pipeline_seconds), FOR_OTHERS: mean(lambda role: role.imbalance_seconds),
                 FOR_STRAGGLERS: mean(lambda role: role.straggler_seconds)}  # fmt: skip
        return {what: seconds for what, seconds in (computed | exposed | waits).items() if seconds > 0}


def predict(
    recipe: Recipe,
    cluster: Cluster,
    world: int,
    shares: Shares | None = None,
    spans: Spans = None,
    stragglers: float = 0.0,
    results: Results | None = None,
) -> Prediction:
    """Returns the prediction of a step on `world` devices of `cluster`.

    `shares`: of the tokens of a layer, those of each expert; None: equal shares. `spans`: as for `replay`. `stragglers`: the
    standard deviation of the ranks' times, as a fraction. `results`: those that other traces share with this one (`Traced`).
    Raises RecipeError if the recipe is wrong for that world, cannot be traced, or needs a figure that the cluster does not have.
    """
    cluster = cluster.for_world(world)
    recipe = on_cluster(recipe, cluster)
    layout = recipe.validate(world)
    for part in cluster.parts:
        part.chip.peak(recipe.train.dtype)  # refuses a chip that has none
    peaks = sum((part.devices or 0) * part.chip.peak(recipe.train.stored_dtype) for part in cluster.parts)  # as in a run
    roles = trace_world(recipe, world, Traced(chip=chip_type(cluster), shares=shares, results=results or Results()))

    def seconds(rank: int, operator: Operator) -> float:
        return operator_seconds(cluster.part_of(rank).chip, operator)

    replayed = replay(roles, layout, cluster, seconds, spans, stragglers)
    tokens = recipe.data.global_batch * recipe.data.sequence_length
    return Prediction(
        recipe=recipe,
        cluster=cluster,
        layout=layout,
        replayed=replayed,
        stragglers=stragglers,
        tokens=tokens,
        peak_flops_per_second=peaks,
        model_flops=tokens * model_flops_per_token(recipe.model, recipe.data.sequence_length),
        executed_flops=sum(role.ranks * role.trace.flops() for role in roles),
        memory=_memory(replayed.roles, cluster),
    )


def _memory(roles: Sequence[ReplayedRole], cluster: Cluster) -> list[RankMemory]:
    """Returns the memory of each coordinate of the pipeline."""
    found: dict[int, RankMemory] = {}
    for replayed in roles:
        memory = RankMemory(replayed.role.pipeline, replayed.peak, cluster.part_of(replayed.role.trace.rank).chip)
        known = found.get(memory.pipeline)
        if known is None or memory.spare_bytes < known.spare_bytes:
            found[memory.pipeline] = memory
    return [found[pipeline] for pipeline in sorted(found)]

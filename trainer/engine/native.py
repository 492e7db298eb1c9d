"""The project's own engine: flat gradient buckets (parallel/data) and an optimizer over their shards.

An engine is built at the start of a run, and a new engine whenever layers move to other ranks.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager

import torch

from bagualu.comm.group import Group
from bagualu.fault_tolerance.guard.engine import StateShard
from bagualu.parallel.balance.stages.forecast import Split
from bagualu.parallel.data.bucket import Bucket, build_buckets, gathering
from bagualu.parallel.data.gather import WeightGatherer
from bagualu.parallel.data.reducer import GradientReducer
from bagualu.parallel.memory_kinds import GRADIENTS
from bagualu.parallel.mesh import Mesh
from bagualu.parallel.parallelize import Fill
from bagualu.parallel.sharding import ShardingPlan
from bagualu.parallel.untrained import Untrained, untrained_of
from bagualu.trainer.engine.local_model import local_model, operators_of
from bagualu.trainer.engine.sharded import ShardedEngine, untrained_shard
from bagualu.trainer.models.decoder.model import Decoder
from bagualu.trainer.optim.groups import Treatment
from bagualu.trainer.optim.sharded import ShardedOptimizer
from bagualu.trainer.recipe.config import Recipe


class NativeEngine(ShardedEngine):
    """The `Engine` of protocol.py, over flat gradient buckets."""

    def __init__(
        self,
        model: Decoder,
        buckets: list[Bucket],
        frozen: list[Bucket],
        untrained: list[Untrained],
        reducer: GradientReducer,
        optimizer: ShardedOptimizer,
        gatherer: WeightGatherer | None,
        world: Group,
    ) -> None:
        """`frozen`: the buckets of frozen parameters under ZeRO-3; under other stages these parameters are in `untrained`.
        `gatherer`: under ZeRO-3, what gathers weights when they are used; else None."""
        super().__init__(model, buckets, frozen, untrained, optimizer, world)
        self.buckets, self.reducer, self.gatherer, self._frozen = buckets, reducer, gatherer, frozen
        if gatherer is not None:
            model.call = gatherer

    @property
    def before_reduction(self) -> Callable[[torch.Tensor], None] | None:
        return self.reducer.before_reduction

    @before_reduction.setter
    def before_reduction(self, call: Callable[[torch.Tensor], None] | None) -> None:
        self.reducer.before_reduction = call

    def begin(self, micro_batches: int) -> None:
        self.reducer.begin(micro_batches)
        if self.gatherer is not None:
            self.gatherer.begin()

    def putting_off(self) -> AbstractContextManager[list[Callable[[], None]]]:
        return self.reducer.putting_off()

    def finish(self) -> None:
        self.reducer.finish()
        if self.gatherer is not None:
            self.gatherer.end()

    def step(self, lr: float, gradient_factor: float) -> None:
        """Updates this rank's state. While it updates a shard, the working weights of those before it are gathered. Collective."""
        with gathering() as gather:
            self.optimizer.step(lr, gradient_factor, lambda index: gather(self.buckets[index]))

    def publish(self) -> None:
        super().publish()
        with gathering() as gather:
            for bucket in self.buckets:
                gather(bucket)

    def held(self) -> Iterator[tuple[str, torch.Tensor]]:
        yield from super().held()
        yield from ((GRADIENTS, bucket.gradients) for bucket in self.buckets)

    def working_weights(self) -> Iterator[Sequence[torch.Tensor]]:
        return ((bucket.weights, bucket.shard_weights) for bucket in self.buckets)

    def shards(self) -> list[StateShard]:
        trained = [_state_shard(*both) for both in zip(self.buckets, self.optimizer.shards(), strict=True)]
        frozen = [_state_shard(bucket, {"weight": bucket.shard_weights}) for bucket in self._frozen]
        return trained + frozen + [untrained_shard(part) for part in self.untrained]

    def open(self) -> None:
        self.reducer.lend()
        super().open()

    def close(self) -> None:
        self.reducer.close()
        if self.gatherer is not None:  # it and the model refer to each other
            del self.model.call


def _state_shard(bucket: Bucket, tensors: dict[str, torch.Tensor]) -> StateShard:
    kind, others = bucket.kind, len(bucket.entries) - 1
    held_along = [] if bucket.partitioned else [kind.reduction_axis]
    held_along += [kind.copied_over] if kind.copied_over else []
    return StateShard(
        name=bucket.entries[0].name + (f" and {others} more" if others else ""),
        tensors=tensors,
        axis=kind.reduction_axis,
        group=bucket.group,
        held_along=[*held_along, "ends"] if kind.tied else held_along,
        copies=_copies(bucket),
    )


def _copies(bucket: Bucket) -> Sequence[torch.Tensor]:
    if bucket.kept is not None:
        return (bucket.kept,)
    return bucket.weights.chunk(bucket.group.size) if bucket.partitioned else (bucket.weights,)


def hold(recipe: Recipe, mesh: Mesh, split: Split, fill: Fill) -> NativeEngine:
    """Builds an engine that holds this rank's stages of `split`, with weights and buffers from `fill`."""
    parallel = recipe.parallel
    zero, buckets = parallel.zero_stage, list[Bucket]()

    def treat(name: str, parameter: torch.nn.Parameter) -> Treatment:
        return recipe.optim.treatment(name, parameter.ndim)

    def take(model: Decoder, plan: ShardingPlan, parameters: list[tuple[str, torch.nn.Parameter]]) -> None:
        buckets[:0] = build_buckets(parameters, plan, mesh, zero, parallel.bucket_bytes, model.uses, treat)

    dtype, world = getattr(torch, recipe.train.stored_dtype), mesh.group("world")
    if zero == 3:  # unit by unit, so that not even at the start a rank holds all weights
        model, plan = local_model(recipe, mesh, split, fill, dtype, take)
        gatherer = WeightGatherer(model.units, buckets, _spare(mesh, split), model.reads_weights_again)
    else:
        model, plan = local_model(recipe, mesh, split, fill, dtype)
        take(model, plan, list(model.named_parameters()))
        gatherer = None
    trained, frozen = ([bucket for bucket in buckets if bucket.kind.trained is wanted] for wanted in (True, False))
    reducer = GradientReducer(trained, mesh)
    optimizer = ShardedOptimizer(trained, recipe.optim, world.device, recipe.run.seed, operators_of(recipe, world.device).update)
    untrained = list(untrained_of(model, plan, mesh, frozen=zero < 3))
    return NativeEngine(model, trained, frozen, untrained, reducer, optimizer, gatherer, world)


def _spare(mesh: Mesh, split: Split) -> int:
    """Returns how many bytes of gathered weights this rank can keep for a whole step within parallel.memory_bytes; 0 without that
    limit."""
    spare = split.forecast.spare_bytes if split.forecast else []
    return spare[mesh.at("pipeline")] if spare else 0

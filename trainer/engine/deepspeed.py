"""DeepSpeed's own engine (ZeRO 1, 2 and 3), behind the protocol of protocol.py.

DeepSpeed divides weights, gradients and master weights among the data ranks, gathers and reduces them. Three things stay the
project's own: the rules of the optimizer, which DeepSpeed calls with its flat partitions (deepspeed_zero.py); what is done about a
step; and checkpoints, for which nothing of DeepSpeed is written.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch
from torch.utils.hooks import RemovableHandle

from bagualu.comm.group import Group
from bagualu.comm.monitor import Phase
from bagualu.fault_tolerance.guard.engine import StateShard
from bagualu.parallel.balance.stages.forecast import Split
from bagualu.parallel.data.bucket import BucketKind, Entry, kind_of
from bagualu.parallel.data.shard import norm_squared
from bagualu.parallel.memory_kinds import COMMUNICATION, GRADIENTS
from bagualu.parallel.mesh import Mesh
from bagualu.parallel.parallelize import Fill
from bagualu.parallel.pipeline.runtime import Slices
from bagualu.parallel.precision import accurate_dtype
from bagualu.parallel.sharding import ShardingPlan
from bagualu.parallel.untrained import untrained_of
from bagualu.trainer.engine.deepspeed_library import load
from bagualu.trainer.engine.deepspeed_parts import Members, ZeroPart, sharded_part
from bagualu.trainer.engine.deepspeed_zero import FlatZero, Ranks, ShardedZero, Subset, Zero
from bagualu.trainer.engine.local_model import local_model, operators_of
from bagualu.trainer.engine.sharded import ShardedEngine, untrained_shard
from bagualu.trainer.models.decoder.model import Decoder
from bagualu.trainer.optim.sharded import ShardedOptimizer
from bagualu.trainer.recipe.config import Recipe


class DeepSpeedEngine(ShardedEngine):
    """The `Engine` of protocol.py, over DeepSpeed. Experts that are split over ranks have an engine of DeepSpeed of their own,
    because other ranks divide them than divide the other parameters."""

    def __init__(self, model: Decoder, plan: ShardingPlan, mesh: Mesh, recipe: Recipe) -> None:
        self._mesh, self._stage = mesh, recipe.parallel.zero_stage
        self.before_reduction: Callable[[torch.Tensor], None] | None = None
        self._handles: list[RemovableHandle] = []
        self._passes = 0
        """The number of forward passes that the step still has to do."""
        self._unused = False
        """Whether gradients were reduced that no update has used."""
        device = mesh.group("world").device
        library, config = load(device), recipe.deepspeed_terms(mesh.layout).library_config()
        trained, frozen = _members(model, plan, mesh, recipe)
        self._watch(trained)
        self._call: Callable[..., Any] = model
        self._zeros: list[Zero] = []
        for axis in ("fold", "replica"):
            members = {kind: entries for kind, entries in trained.items() if _divided_over(kind, mesh) == axis}
            if not members:
                continue
            ranks = Ranks(mesh.group(axis), mesh.group("alone"))
            zero = (
                ShardedZero(library, model, members, ranks, config)
                if self._stage == 3
                else FlatZero(library, Subset(members, self._call), members, ranks, config)
            )
            self._zeros.append(zero)
            self._call = zero.engine
        parts = [part for zero in self._zeros for part in zero.parts]
        optimizer = ShardedOptimizer(parts, recipe.optim, device, recipe.run.seed, operators_of(recipe, device).update)
        self._places = {part.shard_weights.data_ptr(): place for place, part in enumerate(parts)}
        divided = list(_frozen_parts(frozen, mesh)) if self._stage == 3 else []
        untrained = list(untrained_of(model, plan, mesh, frozen=self._stage < 3))
        super().__init__(model, parts, divided, untrained, optimizer, mesh.group("world"))
        self._frozen = divided
        if self._stage == 3:
            self.publish()  # the working weights get the zeros that `sharded_part` has set

    def _watch(self, trained: Members) -> None:
        """Has the gradients of each backward pass summed over a second axis where ranks compute only a part of them and, in stages
        2 and 3, shown to `before_reduction` before DeepSpeed reduces them."""
        for kind, entries in trained.items():
            for entry in entries:
                entry.parameter.grad_dtype = accurate_dtype(entry.parameter.dtype)  # otherwise autograd rounds to the weight's
                if kind.partial_over:
                    self._handles.append(entry.parameter.register_hook(partial(_summed, self._mesh.group(kind.partial_over))))
                if self._stage > 1:
                    self._handles.append(entry.parameter.register_post_accumulate_grad_hook(self._show))

    def _show(self, parameter: torch.Tensor) -> None:
        if self.before_reduction is not None and parameter.grad is not None:
            self.before_reduction(parameter.grad)

    @property
    def slices(self) -> Slices:
        # In ZeRO-1 DeepSpeed reduces after the last pass, and need not know of the passes of a pipeline.
        return self.model if self._stage == 1 else self._run

    def _run(
        self, inputs: torch.Tensor, labels: torch.Tensor | None, chunk: int, documents: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if torch.is_grad_enabled():
            self._passes -= 1
            for zero in self._zeros:
                zero.engine.set_gradient_accumulation_boundary(self._passes == 0)
        outputs: tuple[torch.Tensor, torch.Tensor] = self._call(inputs, labels, chunk, documents)
        return outputs

    def begin(self, micro_batches: int) -> None:
        for zero in self._zeros:
            if self._unused:  # the last attempt was discarded
                zero.step(None)
            zero.begin()
        self._passes, self._unused = micro_batches, False

    def putting_off(self) -> AbstractContextManager[list[Callable[[], None]]]:
        return nullcontext([])  # nothing is deferred; schedules that need it are refused

    def finish(self) -> None:
        self._mesh.monitor.at(Phase.BUCKET)
        if self._stage == 1:
            for zero in self._zeros:
                assert isinstance(zero, FlatZero)
                zero.reduce(self._mesh.groups.get("ends"), self.before_reduction)
        self._unused = True

    def norm_squared(self) -> torch.Tensor:
        total = torch.zeros((), dtype=torch.float64, device=self._mesh.group("world").device)
        for zero in self._zeros:
            for place, part in enumerate(zero.parts):
                squares = sum(norm_squared(gradient.reshape(-1)) for gradient in zero.gradients(place)) * zero.scale**2
                total += squares if part.owned else squares * 0.0  # a copy does not count, but must be finite too
        return total

    def reduced_gradients(self) -> Iterator[torch.Tensor]:
        return (gradient for zero in self._zeros for place in range(len(zero.parts)) for gradient in zero.gradients(place))

    def step(self, lr: float, gradient_factor: float) -> None:
        self._mesh.monitor.at(Phase.OPTIMIZER)
        self.optimizer.begin_step()
        for zero in self._zeros:
            if not zero.step(partial(self._update, lr, gradient_factor * zero.scale)):
                raise RuntimeError("DeepSpeed has left out an update although the gradient is finite: its own norm of the gradient "
                                   "has overflowed")  # fmt: skip
        self._unused = False

    def _update(self, lr: float, gradient_factor: float, partition: torch.Tensor) -> None:
        """Updates one of DeepSpeed's flat partitions of master weights."""
        place = self._places[partition.data_ptr()]
        part = self.optimizer.parts[place]
        assert isinstance(part, ZeroPart)
        assert partition.grad is not None
        part.shard_gradients = partition.grad
        self.optimizer.step_shard(place, lr, gradient_factor)
        part.shard_gradients = partition.new_empty(0)

    def publish(self) -> None:
        for zero in self._zeros:
            zero.publish()

    def shards(self) -> list[StateShard]:
        states = iter(self.optimizer.shards())
        trained = [part.state(next(states), zero.copies(place)) for zero in self._zeros for place, part in enumerate(zero.parts)]
        frozen = [part.state({"weight": part.shard_weights}, [part.shard_weights]) for part in self._frozen]
        return trained + frozen + [untrained_shard(part) for part in self.untrained]

    def held(self) -> Iterator[tuple[str, torch.Tensor]]:
        yield from super().held()
        yield from ((GRADIENTS, gradients) for zero in self._zeros for gradients in zero.flat_gradients())
        yield from ((COMMUNICATION, buffer) for zero in self._zeros for buffer in zero.reduction_buffers())

    def working_weights(self) -> Iterator[Sequence[torch.Tensor]]:
        return (zero.copies(place) for zero in self._zeros for place in range(len(zero.parts)))

    def close(self) -> None:
        for handle in self._handles:
            handle.remove()
        for zero in self._zeros:
            zero.close()


def _summed(group: Group, gradient: torch.Tensor) -> torch.Tensor:
    total = gradient.clone(memory_format=torch.contiguous_format)
    group.all_reduce(total)
    return total


def _members(model: Decoder, plan: ShardingPlan, mesh: Mesh, recipe: Recipe) -> tuple[Members, Members]:
    """Returns the parameters of this rank's part of the model that are trained, and those that are frozen."""
    trained: Members = {}
    frozen: Members = {}
    for local_name, parameter in model.named_parameters():
        name = plan.global_name(local_name)
        kind = kind_of(name, local_name, recipe.optim.treatment(name, parameter.ndim), plan, mesh)
        entries = (trained if parameter.requires_grad else frozen).setdefault(kind, [])
        start = entries[-1].start + entries[-1].parameter.numel() if entries else 0
        held: Any = parameter
        entries.append(Entry(name, parameter, held.global_shape, held.box, start, model.uses(parameter)))
    return trained, frozen


def _divided_over(kind: BucketKind, mesh: Mesh) -> str:
    """Returns the axis over which DeepSpeed divides parameters. Experts that all ranks hold are like any other parameter."""
    return kind.reduction_axis if mesh.layout.expert > 1 else "fold"


def _frozen_parts(frozen: Members, mesh: Mesh) -> Iterator[ZeroPart]:
    """Yields this rank's parts of the frozen parameters under ZeRO-3, which DeepSpeed keeps each in its own memory."""
    for kind, entries in frozen.items():
        for entry in entries:
            held: Any = entry.parameter
            yield sharded_part(kind, mesh.group("fold"), [entry], held.ds_tensor.detach())


def hold(recipe: Recipe, mesh: Mesh, split: Split, fill: Fill) -> DeepSpeedEngine:
    """Builds an engine that holds this rank's stages of `split`, with weights and buffers from `fill`. Collective."""
    model, plan = local_model(recipe, mesh, split, fill, getattr(torch, recipe.train.stored_dtype))
    return DeepSpeedEngine(model, plan, mesh, recipe)

"""Under ZeRO-3, gathers the weights of a module just before they are used and frees them just after.

A rank keeps only its shard of the working weights. The flat tensor of a bucket, which the module's parameters are views of, has
memory only while the module computes: in the forward pass, and again in the backward pass. The order in which modules compute is
the same in every step, so it is recorded in the first step; from then on the weights of the next module are gathered while a module
computes.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from bagualu.comm.backend import Work
from bagualu.parallel.data.bucket import Bucket


@dataclass(eq=False)
class _Weights:
    """The gathered weights of a bucket."""

    bucket: Bucket
    kept: bool = False
    """Whether they stay until the end of the step once they are gathered."""
    users: int = 0
    """The number of modules that compute with them now."""
    present: bool = False
    """Whether they have memory: they are there, or `work` is still gathering them."""
    work: Work | None = None

    def gather(self) -> None:
        """Begins to gather the weights, unless they are present."""
        if self.present:
            return
        flat, shard = self.bucket.weights, self.bucket.shard_weights
        flat.untyped_storage().resize_(flat.numel() * flat.itemsize)
        self.work, self.present = self.bucket.group.all_gather(flat, shard, asynchronous=True), True

    def wait(self) -> None:
        if self.work is not None:
            self.work.wait()
            self.work = None

    def free(self) -> None:
        self.wait()
        self.bucket.weights.untyped_storage().resize_(0)
        self.present = False


@dataclass(eq=False)
class _Unit:
    """A module whose weights are gathered together."""

    weights: list[_Weights]
    backward: bool
    """Whether the backward pass reads the weights too."""
    users: int = 0


class WeightGatherer:
    """Calls the modules of a model with their weights gathered. Before the first call nothing is gathered.

    All ranks of a bucket's group make the same calls in the same order.
    """

    def __init__(
        self, modules: Sequence[nn.Module], buckets: Sequence[Bucket], keep_bytes: int, backward: Callable[[nn.Module], bool]
    ) -> None:
        """`modules` in the order of the forward pass; a parameter may belong to two of them. Up to `keep_bytes` of weights, once
        gathered, stay until the end of the step. `backward` returns whether the backward pass of a module reads its weights."""
        divided = [_Weights(bucket) for bucket in buckets if bucket.kept is not None]
        weights_of = {id(entry.parameter): weights for weights in divided for entry in weights.bucket.entries}
        for weights in divided:
            keep_bytes -= weights.bucket.weights.numel() * weights.bucket.weights.itemsize
            weights.kept = keep_bytes >= 0
        self._weights = divided
        self._units: dict[nn.Module, _Unit] = {}
        for module in modules:
            held = {id(part): part for part in (weights_of.get(id(p)) for p in module.parameters()) if part is not None}
            self._units[module] = _Unit(list(held.values()), backward(module))
        self._order = list(self._units.values())
        self._recorded: list[_Unit] = []
        """The units in the order in which the last step used them, forward and backward."""
        self._used = 0
        """How many of `_recorded` this step has used so far."""
        self._in_step = False

    def begin(self) -> None:
        """Prepares for a step: frees all weights and follows the recorded order from its beginning."""
        self.end()
        self._in_step = True

    def end(self) -> None:
        """Frees all weights. Call before they change."""
        for weights in self._weights:
            weights.users = 0
            if weights.present:
                weights.free()
        for unit in self._order:
            unit.users = 0
        self._used, self._in_step = 0, False

    def __call__(self, module: nn.Module, *inputs: Any) -> Any:
        """Returns module(*inputs). If gradients are computed, the weights are gathered again for the backward pass."""
        unit = self._units[module]
        first = inputs[0]
        differentiates = unit.backward and torch.is_grad_enabled()
        if differentiates and (first.requires_grad or any(parameter.requires_grad for parameter in module.parameters())):
            # A first input that needs no gradient gets one, so that its node in the graph tells when the module is done.
            first = _AfterBackward.apply(self, unit, first if first.requires_grad else first.detach().requires_grad_())
        with self._using(unit):
            outputs = module(first, *inputs[1:])
        if not differentiates:
            return outputs
        several = outputs if isinstance(outputs, tuple) else (outputs,)
        differentiable = [index for index, output in enumerate(several) if output is not None and output.requires_grad]
        if not differentiable:
            return outputs
        passed = dict(zip(differentiable, _BeforeBackward.apply(self, unit, *(several[i] for i in differentiable)), strict=True))
        several = tuple(passed.get(index, output) for index, output in enumerate(several))
        return several if isinstance(outputs, tuple) else several[0]

    @contextmanager
    def _using(self, unit: _Unit) -> Iterator[None]:
        self.acquire(unit)
        try:
            yield
        finally:
            self.release(unit)

    def acquire(self, unit: _Unit) -> None:
        """Gathers the weights of `unit`, unless they are there, and begins to gather those of the unit that is used next."""
        for weights in unit.weights:
            weights.gather()
            weights.users += 1
        unit.users += 1
        if unit.users == 1:  # a module that is computed again within its backward pass is already in use
            for weights in self._next(unit):
                weights.gather()
        for weights in unit.weights:
            weights.wait()

    def release(self, unit: _Unit) -> None:
        """Frees the weights of `unit`, unless they are still in use, stay for the whole step, or are used next."""
        unit.users -= 1
        soon = self._recorded[self._used].weights if self._in_step and self._used < len(self._recorded) else []
        for weights in unit.weights:
            weights.users -= 1
            if not weights.users and not (self._in_step and weights.kept) and weights not in soon:
                weights.free()

    def _next(self, unit: _Unit) -> list[_Weights]:
        """Records that `unit` is used, and returns the weights that are used next, as far as is known."""
        if not self._in_step:  # a validation: only forward passes
            following = self._order.index(unit) + 1
            return self._order[following].weights if following < len(self._order) else []
        if self._used < len(self._recorded) and self._recorded[self._used] is not unit:
            for weights in self._recorded[self._used].weights:
                if weights.present and not weights.users and not weights.kept:
                    weights.free()
            del self._recorded[self._used :]
        if self._used == len(self._recorded):
            self._recorded.append(unit)
        self._used += 1
        return self._recorded[self._used].weights if self._used < len(self._recorded) else []


class _BeforeBackward(torch.autograd.Function):
    """Returns its inputs. Before gradients go back through them, the weights of a unit are gathered."""

    @staticmethod
    def forward(ctx: Any, gatherer: WeightGatherer, unit: _Unit, *outputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
        ctx.gatherer, ctx.unit = gatherer, unit
        ctx.set_materialize_grads(False)
        return tuple(output.view_as(output) for output in outputs)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        ctx.gatherer.acquire(ctx.unit)
        return None, None, *grads


class _AfterBackward(torch.autograd.Function):
    """Returns its input. After the gradient has gone back through it, the weights of a unit are released."""

    @staticmethod
    def forward(ctx: Any, gatherer: WeightGatherer, unit: _Unit, x: torch.Tensor) -> torch.Tensor:
        ctx.gatherer, ctx.unit = gatherer, unit
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        ctx.gatherer.release(ctx.unit)
        return None, None, grads[0]

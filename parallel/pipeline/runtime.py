"""Executes one rank's list of actions: an interpreter with one method per kind of action.

A pipeline of one rank is a pipeline too: the list then has no messages, and this is gradient accumulation.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Protocol

import torch

from bagualu.comm.backend import Work
from bagualu.parallel.mesh import Mesh
from bagualu.parallel.pipeline.backward import backward
from bagualu.parallel.pipeline.program import Program
from bagualu.parallel.pipeline.schedule import PASSES, RECEIVES, Action, Kind
from bagualu.parallel.pipeline.stopwatch import Stopwatch


class Slices(Protocol):
    """This rank's stages. The model's first stage gets token ids, its last one also labels."""

    def __call__(self, inputs: torch.Tensor, labels: torch.Tensor | None, place: int) -> tuple[torch.Tensor, torch.Tensor]:
        """(output, auxiliary) of the rank's stage number `place`: activations for the next stage, or on the model's last one the
        summed loss, a scalar; and a scalar of this stage's own losses (0 where it has none)."""


class WeightGradients(Protocol):
    """Whoever computes gradients of weights, and can put that off."""

    def putting_off(self) -> AbstractContextManager[list[Callable[[], None]]]:
        """Inside, the list is filled with what is to be called later."""


@dataclass(frozen=True)
class MicroBatch:
    inputs: torch.Tensor
    """Token ids [B, S]; needed on the first stage."""
    labels: torch.Tensor
    """Label ids [B, S]; needed on the last stage."""


@dataclass(frozen=True)
class Seeds:
    """What the backward pass starts from: the derivative of the objective by a summed loss and by an auxiliary loss."""

    loss: float
    auxiliary: float


@dataclass
class StageTotals:
    """Sums over the micro-batches on this rank: the loss on the last stage, the auxiliary losses of the rank's stages."""

    loss: torch.Tensor
    auxiliary: torch.Tensor


@dataclass
class _Passing:
    inputs: torch.Tensor
    output: torch.Tensor
    auxiliary: torch.Tensor


Place = tuple[int, int]
"""(micro-batch, stage)"""


@dataclass
class PipelineRunner:
    """Runs this rank's stages. `activation_shape` and `activation_dtype` are what goes over the border between stages."""

    model: Slices
    mesh: Mesh
    weight_gradients: WeightGradients
    activation_shape: tuple[int, ...]
    activation_dtype: torch.dtype
    device: torch.device
    stopwatch: Stopwatch = field(init=False)
    """When the passes of the last run were done."""
    _held: dict[Place, _Passing] = field(default_factory=dict)
    _put_off: dict[Place, list[Callable[[], None]]] = field(default_factory=dict)
    _arrivals: dict[Action, tuple[torch.Tensor, Work]] = field(default_factory=dict)
    _activations: dict[Place, torch.Tensor] = field(default_factory=dict)
    _gradients: dict[Place, torch.Tensor] = field(default_factory=dict)
    _departures: dict[Action, torch.Tensor] = field(default_factory=dict)
    _sends: dict[Action, Work] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.stopwatch = Stopwatch(self.device)

    def run(self, program: Program, micro_batches: list[MicroBatch], seeds: Seeds | None) -> StageTotals:
        """Execute this rank's program over its micro-batches; without `seeds`, forward passes only and no gradients."""
        zero = torch.zeros((), dtype=torch.float64, device=self.device)
        totals = StageTotals(zero, zero.clone())
        self.stopwatch.begin()
        receives: Iterator[Action] = (action for action in program.actions if action.kind in RECEIVES)
        self._post_ahead(receives)
        do: dict[Kind, Callable[[Action], None]] = {
            Kind.FORWARD: lambda a: self._forward(a, micro_batches[a.micro_batch], seeds is not None, totals),
            Kind.BACKWARD: lambda a: self._backward(a, seeds),
            Kind.INPUT_GRADIENT: lambda a: self._input_gradient(a, seeds),
            Kind.WEIGHT_GRADIENT: self._weight_gradient,
            Kind.RECEIVE_ACTIVATION: lambda a: self._receive(a, receives),
            Kind.RECEIVE_GRADIENT: lambda a: self._receive(a, receives),
            Kind.SEND_ACTIVATION: self._send,
            Kind.SEND_GRADIENT: self._send,
        }
        for action in program.actions:
            if action.kind in PASSES:
                with self.stopwatch.timing(action):
                    do[action.kind](action)
            else:
                do[action.kind](action)
            for send in program.arrived.get(action, ()):
                self._sends.pop(send).wait()  # returns at once, and lets the tensor go
        for work in self._sends.values():
            work.wait()
        self._sends.clear()
        return totals

    def _forward(self, action: Action, batch: MicroBatch, differentiate: bool, totals: StageTotals) -> None:
        self.mesh.monitor.at("forward" if differentiate else "validate")
        place, last = (action.micro_batch, action.stage), action.stage == self.mesh.placement.stages - 1
        inputs = batch.inputs if action.stage == 0 else self._activations.pop(place).requires_grad_(differentiate)
        with torch.set_grad_enabled(differentiate):
            labels = batch.labels if last else None
            output, auxiliary = self.model(inputs, labels, self.mesh.stages.index(action.stage))
        totals.auxiliary += auxiliary.detach()
        if last:
            totals.loss += output.detach()
        else:
            self._hand_on(action, output.detach(), Kind.SEND_ACTIVATION, 1)
        if differentiate:
            self._held[place] = _Passing(inputs, output, auxiliary)

    def _backward(self, action: Action, seeds: Seeds | None) -> None:
        assert seeds is not None, "a schedule with backward passes needs seeds"
        self.mesh.monitor.at("backward")
        place = (action.micro_batch, action.stage)
        held = self._held.pop(place)
        if action.stage == self.mesh.placement.stages - 1:
            gradient = torch.full_like(held.output, seeds.loss)
        else:
            gradient = self._gradients.pop(place)
        outputs, gradients = [held.output], [gradient]
        if held.auxiliary.requires_grad:
            outputs.append(held.auxiliary)
            gradients.append(torch.full_like(held.auxiliary, seeds.auxiliary))
        backward(outputs, gradients)
        if action.stage > 0:
            assert held.inputs.grad is not None
            self._hand_on(action, held.inputs.grad, Kind.SEND_GRADIENT, -1)

    def _input_gradient(self, action: Action, seeds: Seeds | None) -> None:
        with self.weight_gradients.putting_off() as put_off:
            self._backward(action, seeds)
        self._put_off[action.micro_batch, action.stage] = put_off

    def _weight_gradient(self, action: Action) -> None:
        self.mesh.monitor.at("backward")
        with torch.no_grad():
            for compute in self._put_off.pop((action.micro_batch, action.stage)):
                compute()

    def _hand_on(self, action: Action, tensor: torch.Tensor, send: Kind, step: int) -> None:
        """What a pass gives to the next stage: to a message, or where this rank holds that stage too, to its pass."""
        if self.mesh.placement.neighbour(action.stage, step) is not None:
            self._departures[Action(send, action.micro_batch, action.stage)] = tensor
            return
        waiting = self._activations if send == Kind.SEND_ACTIVATION else self._gradients
        waiting[action.micro_batch, action.stage + step] = tensor

    def _post_ahead(self, receives: Iterator[Action]) -> None:
        """On the CPU, start the next receive of the list ahead of the pass that needs it, so that it runs beside the computation.
        On an accelerator a waiting receive would hold the stream or the cores that the computation before it needs."""
        if self.device.type == "cpu":
            self._post(next(receives, None))

    def _post(self, action: Action | None) -> None:
        if action is None:
            return
        buffer = torch.empty(self.activation_shape, dtype=self.activation_dtype, device=self.device)
        gradients = action.kind == Kind.RECEIVE_GRADIENT
        source = self.mesh.placement.rank_of(action.stage + (1 if gradients else -1))
        group = self.mesh.messages(gradients, source, self.mesh.at("pipeline"))
        self._arrivals[action] = (buffer, group.receive(buffer, source, asynchronous=True))

    def _receive(self, action: Action, receives: Iterator[Action]) -> None:
        if action not in self._arrivals:
            self._post(next(receives))
        buffer, work = self._arrivals.pop(action)
        work.wait()
        place = (action.micro_batch, action.stage)
        (self._activations if action.kind == Kind.RECEIVE_ACTIVATION else self._gradients)[place] = buffer
        self._post_ahead(receives)

    def _send(self, action: Action) -> None:
        tensor = self._departures.pop(action).contiguous()
        gradients = action.kind == Kind.SEND_GRADIENT
        destination = self.mesh.placement.rank_of(action.stage + (-1 if gradients else 1))
        group = self.mesh.messages(gradients, self.mesh.at("pipeline"), destination)
        self._sends[action] = group.send(tensor, destination, asynchronous=True)

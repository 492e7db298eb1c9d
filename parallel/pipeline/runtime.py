"""Executes one stage's list of actions: an interpreter with one method per kind of action.

A pipeline of one stage is a pipeline too: the list then has no messages, and this is gradient accumulation.
"""

from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Protocol

import torch

from bagualu.comm.backend import Work
from bagualu.parallel.mesh import Mesh
from bagualu.parallel.pipeline.schedule import Action, Kind


class Stage(Protocol):
    """A slice of the model. The first stage gets token ids, the last one also labels."""

    def __call__(self, inputs: torch.Tensor, labels: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
        """(output, auxiliary): activations for the next stage, or on the last one the summed loss, a scalar; and a scalar
        of this stage's own losses (0 where it has none)."""


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
    """Sums over the micro-batches on this rank: the loss on the last stage, the auxiliary losses of this stage."""

    loss: torch.Tensor
    auxiliary: torch.Tensor


@dataclass
class _Passing:
    inputs: torch.Tensor
    output: torch.Tensor
    auxiliary: torch.Tensor


@dataclass
class PipelineRunner:
    """Runs this rank's stage. `activation_shape` and `activation_dtype` are what goes over the border between stages."""

    stage: Stage
    mesh: Mesh
    activation_shape: tuple[int, ...]
    activation_dtype: torch.dtype
    device: torch.device
    _held: dict[int, _Passing] = field(default_factory=dict)
    _arrivals: dict[Action, tuple[torch.Tensor, Work]] = field(default_factory=dict)
    _ready: dict[Action, torch.Tensor] = field(default_factory=dict)
    _departures: dict[Action, torch.Tensor] = field(default_factory=dict)
    _activation_sends: dict[int, Work] = field(default_factory=dict)
    _gradient_sends: deque[Work] = field(default_factory=deque)

    def run(self, actions: list[Action], micro_batches: list[MicroBatch], seeds: Seeds | None) -> StageTotals:
        """Execute this rank's list over its micro-batches; without `seeds`, forward passes only and no gradients."""
        zero = torch.zeros((), dtype=torch.float64, device=self.device)
        totals = StageTotals(zero, zero.clone())
        receives: Iterator[Action] = (a for a in actions if a.kind in (Kind.RECEIVE_ACTIVATION, Kind.RECEIVE_GRADIENT))
        self._post_ahead(receives)
        do: dict[Kind, Callable[[Action], None]] = {
            Kind.FORWARD: lambda a: self._forward(a, micro_batches[a.micro_batch], seeds is not None, totals),
            Kind.BACKWARD: lambda a: self._backward(a, seeds),
            Kind.RECEIVE_ACTIVATION: lambda a: self._receive(a, receives),
            Kind.RECEIVE_GRADIENT: lambda a: self._receive(a, receives),
            Kind.SEND_ACTIVATION: self._send,
            Kind.SEND_GRADIENT: self._send,
        }
        for action in actions:
            do[action.kind](action)
        for work in (*self._activation_sends.values(), *self._gradient_sends):
            work.wait()
        self._activation_sends.clear()
        self._gradient_sends.clear()
        return totals

    def _forward(self, action: Action, batch: MicroBatch, differentiate: bool, totals: StageTotals) -> None:
        m = action.micro_batch
        if differentiate:
            self.mesh.monitor.at("forward")
        else:
            self.mesh.monitor.at("validate")
        if self.mesh.first_stage:
            inputs = batch.inputs
        else:
            inputs = self._ready.pop(Action(Kind.RECEIVE_ACTIVATION, m)).requires_grad_(differentiate)
        with torch.set_grad_enabled(differentiate):
            output, auxiliary = self.stage(inputs, batch.labels if self.mesh.last_stage else None)
        totals.auxiliary += auxiliary.detach()
        if self.mesh.last_stage:
            totals.loss += output.detach()
        else:
            self._departures[Action(Kind.SEND_ACTIVATION, m)] = output.detach()
        if differentiate:
            self._held[m] = _Passing(inputs, output, auxiliary)

    def _backward(self, action: Action, seeds: Seeds | None) -> None:
        assert seeds is not None, "a schedule with backward passes needs seeds"
        m = action.micro_batch
        self.mesh.monitor.at("backward")
        held = self._held.pop(m)
        if self.mesh.last_stage:
            gradient = torch.full_like(held.output, seeds.loss)
        else:
            gradient = self._ready.pop(Action(Kind.RECEIVE_GRADIENT, m))
        outputs, gradients = [held.output], [gradient]
        if held.auxiliary.requires_grad:
            outputs.append(held.auxiliary)
            gradients.append(torch.full_like(held.auxiliary, seeds.auxiliary))
        torch.autograd.backward(outputs, gradients)
        if not self.mesh.first_stage:
            assert held.inputs.grad is not None
            self._departures[Action(Kind.SEND_GRADIENT, m)] = held.inputs.grad

    def _post_ahead(self, receives: Iterator[Action]) -> None:
        """On the CPU, start the next receive of the list ahead of the pass that needs it, so that it runs beside the computation.
        On an accelerator a waiting receive would hold the stream or the cores that the computation before it needs."""
        if self.device.type == "cpu":
            self._post(next(receives, None))

    def _post(self, action: Action | None) -> None:
        if action is None:
            return
        buffer = torch.empty(self.activation_shape, dtype=self.activation_dtype, device=self.device)
        position = self.mesh.at("pipeline")
        if action.kind == Kind.RECEIVE_ACTIVATION:
            work = self.mesh.group("pipeline").receive(buffer, position - 1, asynchronous=True)
        else:
            work = self.mesh.group("pipeline_back").receive(buffer, position + 1, asynchronous=True)
        self._arrivals[action] = (buffer, work)

    def _receive(self, action: Action, receives: Iterator[Action]) -> None:
        if action not in self._arrivals:
            self._post(next(receives))
        buffer, work = self._arrivals.pop(action)
        work.wait()
        self._ready[action] = buffer
        if action.kind == Kind.RECEIVE_GRADIENT and action.micro_batch in self._activation_sends:
            self._activation_sends.pop(action.micro_batch).wait()  # it must have arrived, or its gradient could not be here
        self._post_ahead(receives)

    def _send(self, action: Action) -> None:
        tensor = self._departures.pop(action).contiguous()
        position = self.mesh.at("pipeline")
        if action.kind == Kind.SEND_ACTIVATION:
            self._activation_sends[action.micro_batch] = self.mesh.group("pipeline").send(tensor, position + 1, asynchronous=True)
            return
        # The stage before never waits for more than its own gradients to leave, so waiting for old ones here comes to an end.
        while len(self._gradient_sends) > self.mesh.layout.pipeline:
            self._gradient_sends.popleft().wait()
        self._gradient_sends.append(self.mesh.group("pipeline_back").send(tensor, position - 1, asynchronous=True))

"""Executes a rank's list of actions: an interpreter with a method for each kind of action.

A pipeline of a single rank runs in the same way: its list has no messages and amounts to gradient accumulation.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Protocol

import torch

from bagualu.comm.backend import Work
from bagualu.comm.monitor import Phase
from bagualu.parallel.mesh import Mesh
from bagualu.parallel.pipeline.backward import backward
from bagualu.parallel.pipeline.program import Program
from bagualu.parallel.pipeline.schedules.schedule import PASSES, RECEIVES, Action, Kind
from bagualu.parallel.pipeline.stopwatch import Stopwatch
from bagualu.parallel.precision import chip_of


class Slices(Protocol):
    """The part of the model that this rank holds, as a callable that runs one of its stages."""

    def __call__(
        self, inputs: torch.Tensor, labels: torch.Tensor | None, chunk: int, documents: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Runs the rank's stage number `chunk` and returns (output, auxiliary).

        inputs are token ids [B, S] for the model's first stage, else activations. labels [B, S] are given to its last stage only.
        documents as in MicroBatch.
        The output is the activations for the next stage, or on the last stage the sum of the tokens' losses, a scalar. auxiliary is
        a scalar, the sum of this stage's own losses (0 if it has none).
        """


class WeightGradients(Protocol):
    """An object that can defer weight gradients to the W passes of zero-bubble schedules."""

    def putting_off(self) -> AbstractContextManager[list[Callable[[], None]]]:
        """Within this context, weight gradients are deferred. Yields the list to which the functions that compute these gradients
        are added."""


@dataclass(frozen=True)
class MicroBatch:
    inputs: torch.Tensor
    """Token ids [B, S]; used by the first stage."""
    labels: torch.Tensor
    """Label ids [B, S]; used by the last stage."""
    documents: torch.Tensor | None = None
    """The position [B, S] at which the document of each token begins in its row; used by all stages. None: a row is a document."""


@dataclass(frozen=True)
class Seeds:
    """The gradients with which backward passes start: the derivatives of the objective with respect to a micro-batch's summed loss
    and to an auxiliary loss."""

    loss: float
    auxiliary: float


@dataclass
class StageTotals:
    """Sums over this rank's micro-batches: the losses of all tokens (0 if the rank does not hold the last stage), and the auxiliary
    losses of the rank's stages."""

    loss: torch.Tensor
    auxiliary: torch.Tensor


@dataclass
class _Saved:
    inputs: torch.Tensor
    output: torch.Tensor
    auxiliary: torch.Tensor


@dataclass(frozen=True)
class _Run:
    """The inputs and results of one run."""

    micro_batches: list[MicroBatch]
    seeds: Seeds | None
    totals: StageTotals
    receives: Iterator[Action]
    """The receives of the program that have not been started yet, in the program's order."""


Key = tuple[int, int]
"""A pair (micro-batch, stage)."""


def _ignore(action: Action | None) -> None:
    return None


@dataclass
class PipelineRunner:
    """Runs this rank's stages. Activations between stages have shape `activation_shape` and dtype `activation_dtype`."""

    model: Slices
    mesh: Mesh
    weight_gradients: WeightGradients
    activation_shape: tuple[int, ...]
    activation_dtype: torch.dtype
    device: torch.device
    reached: Callable[[Action | None], None] = field(default=_ignore)
    """Called before each action of the program, with None after the last."""
    stopwatch: Stopwatch = field(init=False)
    """The times of the passes of the last run."""
    _saved: dict[Key, _Saved] = field(default_factory=dict)
    _deferred: dict[Key, list[Callable[[], None]]] = field(default_factory=dict)
    _posted: dict[Action, tuple[torch.Tensor, Work]] = field(default_factory=dict)
    _activations: dict[Key, torch.Tensor] = field(default_factory=dict)
    _gradients: dict[Key, torch.Tensor] = field(default_factory=dict)
    _outgoing: dict[Action, torch.Tensor] = field(default_factory=dict)
    _sends: dict[Action, Work] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.stopwatch = Stopwatch(self.device)

    def run(self, program: Program, micro_batches: list[MicroBatch], seeds: Seeds | None) -> StageTotals:
        """Executes this rank's program over its micro-batches and returns the sums of their losses.

        If `seeds` is None, the program must have only forward passes, and no gradients are computed.
        """
        zero = torch.zeros((), dtype=torch.float64, device=self.device)
        receives: Iterator[Action] = (action for action in program.actions if action.kind in RECEIVES)
        run = _Run(micro_batches, seeds, StageTotals(zero, zero.clone()), receives)
        self.stopwatch.begin()
        self._post_ahead(run)
        for action in program.actions:
            self.reached(action)
            if action.kind in PASSES:
                with self.stopwatch.timing(action):
                    _DO[action.kind](self, action, run)
            else:
                _DO[action.kind](self, action, run)
            for send in program.arrived.get(action, ()):
                self._sends.pop(send).wait()  # returns immediately and frees the tensor
        self.reached(None)
        for work in self._sends.values():
            work.wait()
        self._sends.clear()
        return run.totals

    def _forward(self, action: Action, run: _Run) -> None:
        batch, differentiate = run.micro_batches[action.micro_batch], run.seeds is not None
        self.mesh.monitor.at(Phase.FORWARD if differentiate else Phase.VALIDATE)
        key, last = (action.micro_batch, action.stage), action.stage == self.mesh.placement.stages - 1
        inputs = batch.inputs if action.stage == 0 else self._activations.pop(key).requires_grad_(differentiate)
        with torch.set_grad_enabled(differentiate):
            labels = batch.labels if last else None
            documents = () if batch.documents is None else (batch.documents,)
            output, auxiliary = self.model(inputs, labels, self.mesh.stages.index(action.stage), *documents)
        run.totals.auxiliary += auxiliary.detach()
        if last:
            run.totals.loss += output.detach()
        else:
            self._pass_on(action, output.detach(), Kind.SEND_ACTIVATION, 1)
        if differentiate:
            self._saved[key] = _Saved(inputs, output, auxiliary)

    def _backward(self, action: Action, run: _Run) -> None:
        seeds = run.seeds
        assert seeds is not None, "a schedule with backward passes needs seeds"
        self.mesh.monitor.at(Phase.BACKWARD)
        key = (action.micro_batch, action.stage)
        saved = self._saved.pop(key)
        if action.stage == self.mesh.placement.stages - 1:
            gradient = torch.full_like(saved.output, seeds.loss)
        else:
            gradient = self._gradients.pop(key)
        ends = [(saved.output, gradient), (saved.auxiliary, torch.full_like(saved.auxiliary, seeds.auxiliary))]
        ends = [end for end in ends if end[0].requires_grad]  # without mixtures or, in the first stage, with all of it frozen
        if ends:
            backward(*zip(*ends, strict=True))
        if action.stage > 0:
            assert saved.inputs.grad is not None
            self._pass_on(action, saved.inputs.grad, Kind.SEND_GRADIENT, -1)

    def _input_gradient(self, action: Action, run: _Run) -> None:
        with self.weight_gradients.putting_off() as deferred:
            self._backward(action, run)
        self._deferred[action.micro_batch, action.stage] = deferred

    def _weight_gradient(self, action: Action, run: _Run) -> None:
        self.mesh.monitor.at(Phase.BACKWARD)
        with torch.no_grad():
            for compute in self._deferred.pop((action.micro_batch, action.stage)):
                compute()

    def _pass_on(self, action: Action, tensor: torch.Tensor, send: Kind, step: int) -> None:
        """Stores a pass's result for the following send or, if this rank also holds the neighbouring stage, for that stage's
        pass."""
        if self.mesh.placement.neighbour(action.stage, step) is not None:
            self._outgoing[Action(send, action.micro_batch, action.stage)] = tensor
            return
        inputs = self._activations if send == Kind.SEND_ACTIVATION else self._gradients
        inputs[action.micro_batch, action.stage + step] = tensor

    def _post_ahead(self, run: _Run) -> None:
        """On the CPU, starts the program's next receive before the program reaches it, so that it overlaps with computation.
        Elsewhere does nothing.

        On an accelerator, a waiting receive would occupy the stream or the cores that the computation needs.
        """
        if chip_of(self.device) == "cpu":
            self._post(next(run.receives, None))

    def _post(self, action: Action | None) -> None:
        if action is None:
            return
        buffer = torch.empty(self.activation_shape, dtype=self.activation_dtype, device=self.device)
        gradients = action.kind == Kind.RECEIVE_GRADIENT
        source = self.mesh.placement.rank_of(action.stage + (1 if gradients else -1))
        group = self.mesh.messages(gradients, source, self.mesh.at("pipeline"))
        self._posted[action] = (buffer, group.receive(buffer, source, asynchronous=True))

    def _receive(self, action: Action, run: _Run) -> None:
        if action not in self._posted:
            self._post(next(run.receives))
        buffer, work = self._posted.pop(action)
        work.wait()
        key = (action.micro_batch, action.stage)
        (self._activations if action.kind == Kind.RECEIVE_ACTIVATION else self._gradients)[key] = buffer
        self._post_ahead(run)

    def _send(self, action: Action, run: _Run) -> None:
        tensor = self._outgoing.pop(action).contiguous()
        gradients = action.kind == Kind.SEND_GRADIENT
        destination = self.mesh.placement.rank_of(action.stage + (-1 if gradients else 1))
        group = self.mesh.messages(gradients, self.mesh.at("pipeline"), destination)
        self._sends[action] = group.send(tensor, destination, asynchronous=True)


_DO: dict[Kind, Callable[[PipelineRunner, Action, _Run], None]] = {
    Kind.FORWARD: PipelineRunner._forward,
    Kind.BACKWARD: PipelineRunner._backward,
    Kind.INPUT_GRADIENT: PipelineRunner._input_gradient,
    Kind.WEIGHT_GRADIENT: PipelineRunner._weight_gradient,
    Kind.RECEIVE_ACTIVATION: PipelineRunner._receive,
    Kind.RECEIVE_GRADIENT: PipelineRunner._receive,
    Kind.SEND_ACTIVATION: PipelineRunner._send,
    Kind.SEND_GRADIENT: PipelineRunner._send,
}

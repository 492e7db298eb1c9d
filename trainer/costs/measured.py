"""A model's cost table from a short warm-up on this device: every kind of layer there is (embedding, dense layer, mixture, head),
run with the recipe's micro-batch and dtype.

What a backward pass in two parts leaves for its second part is timed apart: parameters have sinks as in a run (parallel/data.py),
which put it off. What they do not put off (norms, the head, all weights of a compiled layer) counts as input gradient, as
it does in a run.

With tensor or expert parallel, a rank's slices are run without the communication around them, and norms on the whole sequence under
sequence parallel too. What a layer's neighbours and the network cost is not in the table.
"""

import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, cast

import torch
from torch import nn

from bagualu.parallel.balance.stages.cost import CostTable, LayerCost
from bagualu.parallel.data import GradientSink
from bagualu.parallel.expert import LocalExperts, Routed
from bagualu.parallel.pipeline.backward import backward
from bagualu.parallel.precision import accurate_dtype
from bagualu.trainer.costs.analytic import ModelWork, end_bytes, layer_bytes
from bagualu.trainer.costs.throughput import synchronize
from bagualu.trainer.models.decoder.layers import RMSNorm
from bagualu.trainer.models.decoder.model import Embedding, Head, Layer
from bagualu.trainer.models.decoder.moe import MixtureOfExperts
from bagualu.trainer.models.decoder.plan import decoder_plan

BUDGET_SECONDS = 1.0
_LEAST_ROUNDS = 3
_MOST_ROUNDS = 30


@dataclass(frozen=True)
class MeasuredCosts:
    """Of one kind of layer and one micro-batch; the words are those of LayerCost."""

    forward_seconds: float
    input_gradient_seconds: float
    weight_gradient_seconds: float
    activation_bytes: int
    input_bytes: int
    operand_bytes: int


def measure(
    work: ModelWork, device: torch.device, compiled: bool, budget_seconds: float = BUDGET_SECONDS
) -> dict[str, MeasuredCosts]:
    """The figures of every kind of layer of `work`: embedding, dense, mixture, head. Kinds take turns, so that what disturbs the
    machine for a while disturbs all of them; medians of at least 3 rounds, as many as fit into about `budget_seconds`."""
    samples = _samples(work, device, compiled)
    bytes_of = {name: sample.bytes_held() for name, sample in samples.items()}  # also the warm-up
    times: dict[str, list[tuple[float, float, float]]] = {name: [] for name in samples}
    started = time.perf_counter()
    for rounds in range(_MOST_ROUNDS):
        if rounds >= _LEAST_ROUNDS and time.perf_counter() - started > budget_seconds:
            break
        for name, sample in samples.items():
            times[name].append(sample.times())
    return {name: MeasuredCosts(*_medians(times[name]), *bytes_of[name]) for name in samples}


def _medians(rows: list[tuple[float, float, float]]) -> tuple[float, float, float]:
    first, second, third = (statistics.median(column) for column in zip(*rows, strict=True))
    return first, second, third


def measured_table(work: ModelWork, figures: dict[str, MeasuredCosts], source: str) -> CostTable:
    """The costs of the whole model from those of its kinds of layers; state is counted from shapes."""
    embedding_bytes, head_bytes, tied_bytes = end_bytes(work)
    layers = [
        _cost(f"layer {index}", figures["mixture" if work.model.is_moe_layer(index) else "dense"], layer_bytes(work, index))
        for index in range(work.model.layers)
    ]
    embedding, head = (_cost(name, figures[name], size) for name, size in (("embedding", embedding_bytes), ("head", head_bytes)))
    return CostTable(embedding, layers, head, source, tied_bytes)


def _cost(name: str, found: MeasuredCosts, state_bytes: int) -> LayerCost:
    return LayerCost(
        name, found.forward_seconds, found.input_gradient_seconds, found.weight_gradient_seconds,
        state_bytes, found.activation_bytes, found.input_bytes, found.operand_bytes,
    )  # fmt: skip


class _Shelf:
    """Stands where the gradient reducer does: all that sinks can put off, they put off."""

    def __init__(self) -> None:
        self.put_off: list[Callable[[], None]] = []
        self.operands: list[torch.Tensor] = []

    def count(self, _: Any) -> None:
        """Nothing is reduced."""

    def compute(self) -> None:
        """What was put off."""
        with torch.no_grad():
            for do in self.put_off:
                do()
        self.clear()

    def clear(self) -> None:
        self.put_off.clear()
        self.operands.clear()


@dataclass
class _Sink(GradientSink):
    """Shows what it keeps until later."""

    def add_products(self, lefts: Sequence[torch.Tensor], rights: Sequence[torch.Tensor]) -> None:
        self.reducer.operands += [*lefts, *rights]  # type: ignore[attr-defined]
        super().add_products(lefts, rights)

    def add_rows(self, rows: torch.Tensor, indices: torch.Tensor) -> None:
        self.reducer.operands += [rows, indices]  # type: ignore[attr-defined]
        super().add_rows(rows, indices)


class _Folded(LocalExperts):
    """As many rows for the experts here as with an even load, whichever experts they are for."""

    def __init__(self, degree: int) -> None:
        self.degree = degree

    def dispatch(self, rows: torch.Tensor, counts: torch.Tensor) -> Routed:
        return Routed(rows, counts.view(self.degree, -1).sum(0).tolist())


@dataclass
class _Sample:
    """One layer with its slices of the weights. `run` takes an input and returns outputs to go backward from."""

    module: nn.Module
    new_input: Callable[[], torch.Tensor]
    run: Callable[[torch.Tensor], tuple[torch.Tensor, ...]]
    device: torch.device
    shelf: _Shelf

    def times(self) -> tuple[float, float, float]:
        """Seconds of forward, input gradient, weight gradient."""
        inputs = self.new_input()
        moments = [self._now()]
        outputs = self.run(inputs)
        moments.append(self._now())
        self._backward(outputs)
        moments.append(self._now())
        self.shelf.compute()
        moments.append(self._now())
        first, second, third = (later - earlier for earlier, later in pairwise(moments))
        return first, second, third

    def bytes_held(self) -> tuple[int, int, int]:
        """Bytes of activations, of the input, of the operands. What two forward passes share (weights, positions) is not theirs."""
        first, second = self._saved(), self._saved()
        activations = sum(size for place, size in second.storages.items() if place not in first.storages)
        self._backward(second.outputs)
        operands = _storages(self.shelf.operands)
        self.shelf.clear()
        return activations, second.inputs.nbytes, sum(operands.values())

    def _saved(self) -> "_Saved":
        inputs, tensors = self.new_input(), list[torch.Tensor]()

        def keep(tensor: torch.Tensor) -> torch.Tensor:
            tensors.append(tensor)
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            outputs = self.run(inputs)
        return _Saved(inputs, outputs, _storages(tensors))

    def _backward(self, outputs: tuple[torch.Tensor, ...]) -> None:
        gradients = [torch.ones_like(output) for output in outputs]
        backward(outputs, gradients)

    def _now(self) -> float:
        synchronize(self.device)
        return time.perf_counter()


@dataclass
class _Saved:
    """A forward pass that has not gone backward yet, and the storages that wait for that: address -> bytes."""

    inputs: torch.Tensor
    outputs: tuple[torch.Tensor, ...]
    storages: dict[int, int]


def _storages(tensors: Iterable[torch.Tensor]) -> dict[int, int]:
    return {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}


def _samples(work: ModelWork, device: torch.device, compiled: bool) -> dict[str, _Sample]:
    model, dtype = work.model, getattr(torch, work.dtype)
    draw = torch.Generator(device).manual_seed(0)  # one of its own: the run's stays as it is
    shape = (work.micro_batch, work.sequence_length)

    def tokens(rows: int) -> torch.Tensor:
        return torch.randint(0, rows, shape, generator=draw, device=device)

    def hidden() -> torch.Tensor:
        return torch.randn(*shape, model.hidden, generator=draw, device=device, dtype=dtype).requires_grad_()

    def sample(module: nn.Module, prefix: str, new_input: Callable[[], torch.Tensor], run: Any, compiled: bool = False) -> _Sample:
        shelf = _localise(module, prefix, work, device, draw, fused=not compiled)
        if compiled:
            module.compile()
        return _Sample(module, new_input, run, device, shelf)

    with torch.device("meta"):
        embedding, head = Embedding(model.padded_vocab, model.hidden), _NormAndHead(work)
        firsts = {model.is_moe_layer(index): index for index in reversed(range(model.layers))}
        layers = {index: Layer(model, index) for index in firsts.values()}
    found = {"embedding": sample(embedding, "embedding.", lambda: tokens(embedding.weight.shape[0]), lambda x: (embedding(x),))}
    for mixture, index in firsts.items():
        layer = layers[index]
        if isinstance(layer.feed_forward, MixtureOfExperts):
            layer.feed_forward.experts.exchange = _Folded(work.layout.expert)
        found["mixture" if mixture else "dense"] = sample(layer, f"layers.{index}.", hidden, _outputs_of(layer), compiled)
    labels = tokens(min(model.vocab, model.padded_vocab // work.layout.tensor))
    found["head"] = sample(head, "", hidden, lambda x: (head(x, labels),))
    return found


def _outputs_of(layer: Layer) -> Callable[[torch.Tensor], tuple[torch.Tensor, ...]]:
    return lambda x: tuple(output for output in layer(x)[:2] if output is not None)


class _NormAndHead(nn.Module):
    def __init__(self, work: ModelWork) -> None:
        super().__init__()
        self.norm = RMSNorm(work.model.hidden, work.model.norm_epsilon)
        self.head = Head(work.model.padded_vocab, work.model.hidden, work.model.vocab)

    def forward(self, x: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        loss: torch.Tensor = self.head(self.norm(x), labels)
        return loss


def _localise(module: nn.Module, prefix: str, work: ModelWork, device: torch.device, draw: torch.Generator, fused: bool) -> _Shelf:
    """Give a module on the meta device rank 0's slices of its weights; with `fused`, kernels know the sinks of their gradients."""
    plan, dtype = decoder_plan(work.model, work.sequence), getattr(torch, work.dtype)
    shelf = _Shelf()
    for module_name, part in module.named_modules():
        for key, meta in list(part.named_parameters(recurse=False)):
            name = prefix + (f"{module_name}.{key}" if module_name else key)
            shape = plan.placement(name).box(name, tuple(meta.shape), work.layout, work.layout.coordinates(0)).shape
            parameter = nn.Parameter(torch.empty(shape, dtype=dtype, device=device).uniform_(-0.02, 0.02, generator=draw))
            parameter.grad_dtype = accurate_dtype(dtype)
            sink = _Sink(cast(Any, shelf), cast(Any, None), torch.zeros_like(parameter, dtype=accurate_dtype(dtype)).detach())
            parameter.register_post_accumulate_grad_hook(sink.take)
            if fused:
                parameter.gradient_sink = sink  # type: ignore[attr-defined]
            setattr(part, key, parameter)
        for key, meta in list(part.named_buffers(recurse=False)):
            setattr(part, key, torch.zeros(meta.shape, dtype=accurate_dtype(dtype), device=device))
    return shelf

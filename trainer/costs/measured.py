"""Measures a model's cost table in a short warm-up on this device: it runs one module of each kind (embedding, attention,
feed-forward, mixture, head) with the recipe's micro-batch and dtype. Attention and what follows it are measured apart, because
different stages may hold them; a layer's costs are the sum.

The weight gradients, which a split backward pass computes in its second part, are timed separately: parameters have gradient sinks
as in a run (parallel/data), which defer them. Gradients that are never deferred (norms, the head) count as part of the input
gradient, as in a run.

Under tensor or expert parallelism, a rank's slices run without the communication around them, and norms run on the whole sequence
even under sequence parallelism. The table contains neither the influence of neighbouring layers nor the cost of the network.
"""

import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, cast

import torch
from torch import nn

from bagualu.parallel.balance.stages.cost import CostTable, LayerCost, joined
from bagualu.parallel.data.reducer import GradientSink
from bagualu.parallel.expert import LocalExperts, Routed
from bagualu.parallel.pipeline.backward import backward
from bagualu.parallel.pipeline.layer_slice import IN_ORDER, LayerPart
from bagualu.parallel.precision import accurate_dtype, chip_of
from bagualu.parallel.products import Products
from bagualu.trainer.costs.analytic import end_bytes, layer_bytes, output_bytes
from bagualu.trainer.costs.tensor_memory import TensorMemory
from bagualu.trainer.costs.throughput import synchronize
from bagualu.trainer.costs.work import ModelWork
from bagualu.trainer.models.decoder.config import ModelConfig
from bagualu.trainer.models.decoder.layers import norm_of
from bagualu.trainer.models.decoder.lora import FIRST
from bagualu.trainer.models.decoder.model import Embedding, Head, Layer
from bagualu.trainer.models.decoder.moe import MixtureOfExperts
from bagualu.trainer.models.decoder.shapes import layer_shapes
from bagualu.trainer.operators.operator_set import OperatorSet, operator_set

BUDGET_SECONDS = 1.0
_LEAST_ROUNDS = 3
_MOST_ROUNDS = 30


@dataclass(frozen=True)
class MeasuredCosts:
    """Costs of one kind of half layer, of the embedding or of the head, for one micro-batch on this device; the fields are those of
    LayerCost."""

    forward_seconds: float
    input_gradient_seconds: float
    weight_gradient_seconds: float
    activation_bytes: int
    input_bytes: int
    operand_bytes: int
    work_bytes: int


Times = tuple[float, float, float]
"""Seconds of the forward pass, the input gradient and the weight gradient."""


def measure(work: ModelWork, device: torch.device, budget_seconds: float = BUDGET_SECONDS) -> dict[str, MeasuredCosts]:
    """Returns the costs by kind of `work`: embedding, attention, feed-forward, mixture, head.

    The kinds take turns, so that a temporary disturbance of the machine affects all of them alike. Times are medians over 3 to 30
    rounds, as many as fit into about `budget_seconds`."""
    samples = _samples(work, device)
    bytes_of = {name: sample.bytes_held() for name, sample in samples.items()}  # also the warm-up
    times: dict[str, list[Times]] = {name: [] for name in samples}
    started = time.perf_counter()
    for rounds in range(_MOST_ROUNDS):
        if rounds >= _LEAST_ROUNDS and time.perf_counter() - started > budget_seconds:
            break
        for name, sample in samples.items():
            times[name].append(sample.times())
    return {name: MeasuredCosts(*_medians(times[name]), *bytes_of[name]) for name in samples}


def _medians(rows: list[Times]) -> Times:
    first, second, third = (statistics.median(column) for column in zip(*rows, strict=True))
    return first, second, third


def measured_table(work: ModelWork, figures: dict[str, MeasuredCosts], source: str) -> CostTable:
    """Returns the costs of the whole model, given those of its kinds; state bytes are computed from shapes."""
    embedding_bytes, head_bytes, tied_bytes = end_bytes(work)

    def half(layer: int, part: LayerPart) -> LayerCost:
        return _cost(part.value, figures[_kind_of(work.model, layer, part)], layer_bytes(work, layer, part))

    layers = [joined(f"layer {layer}", *(half(layer, part) for part in IN_ORDER)) for layer in range(work.model.layers)]
    embedding, head = (_cost(name, figures[name], size) for name, size in (("embedding", embedding_bytes), ("head", head_bytes)))
    return CostTable(embedding, layers, head, source, tied_bytes, output_bytes(work))


def _kind_of(model: ModelConfig, layer: int, part: LayerPart) -> str:
    """Returns the name of the kind of this half of `layer`; halves of a kind cost the same."""
    block = "mixture" if part is LayerPart.FEED_FORWARD and model.is_moe_layer(layer) else part.value
    window = model.window_of(layer) if part is LayerPart.ATTENTION else None
    adapted = [name.removesuffix(FIRST) for name in layer_shapes(model, layer, part) if name.endswith(FIRST)]
    details = [] if window is None else [f"a window of {window}"]
    details += [f"factors of {', '.join(adapted)}"] if adapted else []
    return f"{block} with {' and '.join(details)}" if details else block


def _cost(name: str, found: MeasuredCosts, state_bytes: int) -> LayerCost:
    return LayerCost(
        name, found.forward_seconds, found.input_gradient_seconds, found.weight_gradient_seconds,
        state_bytes, found.activation_bytes, found.input_bytes, found.operand_bytes, found.work_bytes,
    )  # fmt: skip


class _Shelf:
    """Stands in for the GradientReducer: its sinks defer all the work that they can, and nothing is reduced."""

    def __init__(self) -> None:
        self.put_off: list[Callable[[], None]] | None = []
        """The deferred work; None while nothing is deferred."""
        self.operands: list[torch.Tensor] = []

    def count(self, _: Any) -> None:
        """Does nothing, since nothing is reduced."""

    def settle(self) -> None:
        """Does nothing, since nothing is reduced."""

    def prepare(self, _: Any) -> None:
        """Does nothing, since the sinks have memory of their own."""

    def compute(self) -> None:
        """Runs the deferred work, then forgets it and its operands."""
        with torch.no_grad():
            for do in self.put_off or ():
                do()
        self.clear()

    def clear(self) -> None:
        self.put_off = []
        self.operands.clear()

    def record(self, *operands: torch.Tensor) -> None:
        """Keeps the operands of work that is deferred."""
        if self.put_off is not None:
            self.operands += operands


@dataclass
class _Sink(GradientSink):
    """A gradient sink that also records the operands of the work that it defers."""

    def add_products(self, products: Products, columns: Sequence[torch.Tensor], rows: Sequence[torch.Tensor]) -> None:
        self.reducer.record(*columns, *rows)  # type: ignore[attr-defined]
        super().add_products(products, columns, rows)

    def add_rows(self, rows: torch.Tensor, indices: torch.Tensor) -> None:
        self.reducer.record(rows, indices)  # type: ignore[attr-defined]
        super().add_rows(rows, indices)


class _Folded(LocalExperts):
    """An exchange without communication: this rank's experts process all of its own rows, which are as many as a rank receives
    under an even load, and divide them evenly."""

    def __init__(self, degree: int) -> None:
        self.degree = degree

    def dispatch(self, rows: torch.Tensor, counts: torch.Tensor) -> Routed:
        own = counts.shape[0] // self.degree
        each, more = divmod(rows.shape[0], own)
        return Routed(rows, [each + (expert < more) for expert in range(own)])


@dataclass
class _Sample:
    """A module with a rank's slices of its weights. `run` takes an input and returns the outputs where the backward pass begins."""

    module: nn.Module
    new_input: Callable[[], torch.Tensor]
    run: Callable[[torch.Tensor], tuple[torch.Tensor, ...]]
    device: torch.device
    shelf: _Shelf

    def times(self) -> Times:
        """Runs the module once, and returns how long that took."""
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

    def bytes_held(self) -> tuple[int, int, int, int]:
        """Returns the bytes that the module keeps for its backward pass (activations), of its input, of the weight gradients'
        operands, and the most that its passes take besides the activations."""
        activations, saved = self._activations()
        self._backward(saved.outputs)
        operands = _storages(self.shelf.operands)
        self.shelf.clear()
        return activations, saved.inputs.nbytes, sum(operands.values()), self._most() - activations

    def _most(self) -> int:
        """Returns the most bytes that exist during a forward and a backward pass, without deferring weight gradients: activations,
        gradients and intermediate results, but not the module's output, which belongs to the next one."""
        self.shelf.put_off = None
        with TensorMemory() as memory:
            inputs = self.new_input()
            outputs = self.run(inputs)
            own = sum(_storages(outputs).values())
            self._backward(outputs)
        self.shelf.clear()
        return memory.peak - own

    def _activations(self) -> tuple[int, "_Saved"]:
        """Returns the bytes that `run` keeps for the backward pass, and what was saved. Storage that two forward passes share
        (weights, positions) does not count."""
        first, second = self._saved(), self._saved()
        return sum(size for place, size in second.storages.items() if place not in first.storages), second

    def _saved(self) -> "_Saved":
        inputs, tensors = self.new_input(), list[torch.Tensor]()

        def keep(tensor: torch.Tensor) -> torch.Tensor:
            tensors.append(tensor)
            return tensor.detach()  # a node that keeps its own result through a hook is such a cycle too

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            outputs = self.run(inputs)
        storages = _storages(tensors)
        tensors.clear()  # the graph holds `keep`, and so this list: with results of the graph in it, a cycle that nothing frees
        return _Saved(inputs, outputs, storages)

    def _backward(self, outputs: tuple[torch.Tensor, ...]) -> None:
        outputs = tuple(output for output in outputs if output.requires_grad)  # not that of a frozen embedding
        if outputs:
            backward(outputs, [torch.ones_like(output) for output in outputs])

    def _now(self) -> float:
        synchronize(self.device)
        return time.perf_counter()


@dataclass
class _Saved:
    """A forward pass before its backward pass, and the tensor storages that are kept for the backward pass: address -> bytes."""

    inputs: torch.Tensor
    outputs: tuple[torch.Tensor, ...]
    storages: dict[int, int]


def _storages(tensors: Iterable[torch.Tensor]) -> dict[int, int]:
    return {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}


def _samples(work: ModelWork, device: torch.device) -> dict[str, _Sample]:
    model, dtype = work.model, getattr(torch, work.dtype)
    draw = torch.Generator(device).manual_seed(0)  # the run's random state stays as it is
    shape = (work.micro_batch, work.sequence_length)

    def tokens(rows: int) -> torch.Tensor:
        return torch.randint(0, rows, shape, generator=draw, device=device)

    def hidden() -> torch.Tensor:
        return torch.randn(*shape, model.hidden, generator=draw, device=device, dtype=dtype).requires_grad_()

    def sample(module: nn.Module, prefix: str, new_input: Callable[[], torch.Tensor], run: Any) -> _Sample:
        return _Sample(module, new_input, run, device, _localise(module, prefix, work, device, draw))

    operators = operator_set(work.operators, chip_of(device))
    with torch.device("meta"):
        embedding, head = _EmbeddingAndNorm(work, operators), _NormAndHead(work, operators)
        halves = [(index, part) for index in reversed(range(model.layers)) for part in IN_ORDER]
        firsts = {_kind_of(model, *half): half for half in halves}
        layers = {kind: Layer(model, index, operators=operators, part=part) for kind, (index, part) in firsts.items()}
    rows = model.padded_vocab // work.layout.tensor
    found = {"embedding": sample(embedding, "", lambda: tokens(rows), lambda x: (embedding(x),))}
    for kind, (index, part) in firsts.items():
        layer = layers[kind]
        if part is LayerPart.FEED_FORWARD and isinstance(layer.feed_forward, MixtureOfExperts):
            layer.feed_forward.experts.exchange = _Folded(work.layout.expert)
        found[kind] = sample(layer, f"layers.{index}.", hidden, _outputs_of(layer))
    labels = tokens(min(model.vocab, rows))
    found["head"] = sample(head, "", hidden, lambda x: (head(x, labels),))
    return found


def _outputs_of(layer: Layer) -> Callable[[torch.Tensor], tuple[torch.Tensor, ...]]:
    return lambda x: tuple(output for output in layer(x)[:2] if output is not None)


class _EmbeddingAndNorm(nn.Module):
    def __init__(self, work: ModelWork, operators: OperatorSet) -> None:
        super().__init__()
        self.embedding = Embedding(work.model)
        self.embedding_norm = norm_of(work.model, operators) if work.model.embedding_norm else None

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x: torch.Tensor = self.embedding(tokens)
        return x if self.embedding_norm is None else self.embedding_norm(x)


class _NormAndHead(nn.Module):
    def __init__(self, work: ModelWork, operators: OperatorSet) -> None:
        super().__init__()
        self.norm = norm_of(work.model, operators)
        self.head = Head(work.model.padded_vocab, work.model.hidden, work.model.vocab, operators)

    def forward(self, x: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        loss: torch.Tensor = self.head(self.norm(x), labels)
        return loss


def _localise(module: nn.Module, prefix: str, work: ModelWork, device: torch.device, draw: torch.Generator) -> _Shelf:
    """Replaces each parameter of `module`, which is on the meta device, by rank 0's slice of it on `device`, with random values,
    and each buffer by zeros.
    Returns the shelf that collects the deferred gradients, which kernels write straight to the parameters' sinks."""
    plan, dtype = work.plan, getattr(torch, work.dtype)
    shelf = _Shelf()
    for module_name, part in module.named_modules():
        for key, meta in list(part.named_parameters(recurse=False)):
            name = prefix + (f"{module_name}.{key}" if module_name else key)
            shape = plan.placement(name).box(name, tuple(meta.shape), work.layout, work.layout.coordinates(0)).shape
            values = torch.empty(shape, dtype=dtype, device=device).uniform_(-0.02, 0.02, generator=draw)
            parameter = nn.Parameter(values, requires_grad=plan.global_name(name) not in work.frozen)
            setattr(part, key, parameter)
            if not parameter.requires_grad:
                continue
            parameter.grad_dtype = accurate_dtype(dtype)
            sink = _Sink(cast(Any, shelf), cast(Any, None), torch.zeros_like(parameter, dtype=accurate_dtype(dtype)).detach())
            parameter.register_post_accumulate_grad_hook(sink.take)
            parameter.gradient_sink = sink  # type: ignore[attr-defined]
        for key, meta in list(part.named_buffers(recurse=False)):
            setattr(part, key, torch.zeros(meta.shape, dtype=accurate_dtype(dtype), device=device))
    return shelf

"""The decoder, or any slices of its layers, with the embedding and the head where they belong.

Shapes: B micro-batch, S sequence, H hidden, V vocabulary, P positions.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn

from bagualu.comm.agree import summed
from bagualu.comm.group import Group
from bagualu.parallel.pipeline.layer_slice import LayerPart, LayerSlice, parts_of
from bagualu.parallel.precision import accurate_dtype, multiply_dtype
from bagualu.parallel.vocabulary import embedding, linear_cross_entropy
from bagualu.trainer.models.activations import HostMemory, run
from bagualu.trainer.models.decoder.adapted import add_factors, set_products
from bagualu.trainer.models.decoder.config import ModelConfig
from bagualu.trainer.models.decoder.layers import Attention, FeedForward, Linear, norm_of
from bagualu.trainer.models.decoder.moe import MixtureOfExperts, update_biases
from bagualu.trainer.models.model import Model
from bagualu.trainer.operators.documents import document_mask, positions_in
from bagualu.trainer.operators.linear import linears, plus_bias
from bagualu.trainer.operators.operator_set import BY_RULE, OperatorSet


class LearnedPositions(Linear):
    """Weight [P, H]: a vector for each position. `slice` is the number of the slice of the sequence that this rank holds. `given`
    returns the positions of the whole sequence [B, S]; without it they count from 0."""

    def __init__(self, positions: int, hidden: int) -> None:
        super().__init__(hidden, positions)
        self.slice = 0
        self.given: Callable[[], torch.Tensor] | None = None

    def forward(self, x: torch.Tensor, positions: torch.Tensor | None = None) -> torch.Tensor:
        """x [B, S, H], the positions of all tokens of the sequence [B, ...], by default counted from 0 -> x plus the vectors of its
        positions"""
        length = x.shape[1]
        own = slice(self.slice * length, (self.slice + 1) * length)
        if positions is None and self.given is not None:
            positions = self.given()
        here = torch.arange(own.start, own.stop, device=x.device).expand(x.shape[:2]) if positions is None else positions[:, own]
        return x + embedding(here, self.weight)


class Embedding(Linear):
    """Weight [V, H]: a vector for each token id, to which that of its position is added if positions are learned. `lookup` is
    replaced where the vocabulary is split over ranks."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config.hidden, config.padded_vocab)
        self.positions = LearnedPositions(config.max_positions, config.hidden) if config.max_positions else None
        self.lookup = embedding

    def forward(self, tokens: torch.Tensor, positions: torch.Tensor | None = None) -> torch.Tensor:
        """tokens [B, S], their positions [B, S] if these do not count from 0 -> [B, S, H]"""
        rows: torch.Tensor = self.lookup(tokens, self.weight)
        return rows if self.positions is None else self.positions(rows, positions)


class Head(Linear):
    """Weight [V, H]: the projection to the vocabulary, computed together with the loss. `loss` is replaced where the vocabulary is
    split over ranks, `columns` where only the logits of some tokens of each sequence are needed."""

    def __init__(self, vocabulary: int, hidden: int, real: int, operators: OperatorSet = BY_RULE) -> None:
        super().__init__(hidden, vocabulary)
        self.real = real
        self.loss = partial(
            linear_cross_entropy, vocabulary=real, chunk_loss=operators.loss, products=operators.linear.without_float8
        )
        self.columns = slice(None)

    def forward(self, x: torch.Tensor, labels: torch.Tensor | None = None) -> torch.Tensor:
        """x [B, S, H], labels [B, S] -> the loss summed over tokens; without labels the logits"""
        return self.logits(x[:, self.columns]) if labels is None else self.loss(x.flatten(0, 1), self.weight, labels.flatten())

    def logits(self, x: torch.Tensor) -> torch.Tensor:
        """x [B, S, H] -> logits [B, S, V] in at least float32, without the vocabulary's padding; only those of this rank's part of
        the vocabulary where it is split over ranks. They are multiplied in the dtype in which the loss multiplies them: a wider
        copy of the weight would take longer for each token than all else."""
        frozen = self.frozen
        (logits,) = linears(x, self.weight[: self.real], wide=True) if frozen is None else frozen.outputs(x, wide=True)
        return logits.to(accurate_dtype(x.dtype))


class Layer(nn.Module):
    """Attention and feed-forward, each added to the residual stream, with a norm before or after it; or only that half of a layer
    that `part` names. With `recompute` attention or experts, the backward pass computes this part again from its input."""

    def __init__(
        self,
        config: ModelConfig,
        index: int,
        recompute: str = "none",
        operators: OperatorSet = BY_RULE,
        part: LayerPart = LayerPart.WHOLE,
    ) -> None:
        super().__init__()
        self.recompute, self.part, self.norms_after = recompute, part, config.norm_position == "after"
        if part is not LayerPart.FEED_FORWARD:
            self.attention_norm = norm_of(config, operators)
            self.attention = Attention(config, config.window_of(index), config.scales_rotations(index), operators)
        if part is not LayerPart.ATTENTION:
            self.feed_forward_norm = norm_of(config, operators)
            self.feed_forward = (
                MixtureOfExperts(config, operators)
                if config.is_moe_layer(index)
                else FeedForward(config, config.ffn, config.bias == "all", operators)
            )
        add_factors(self, f"layers.{index}.", config.lora)
        set_products(self, operators.linear)

    def forward(
        self, x: torch.Tensor, mask: torch.Tensor | None = None, part: LayerPart | None = None
    ) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
        """x [B, S, H] -> output [B, S, H] and, for a mixture, the balance loss and the load of its experts [E], else None and
        None. `mask` as in `Attention.forward`. `part`: what is computed, by default all that the layer holds."""
        part = part or self.part
        if part is not LayerPart.FEED_FORWARD:
            x = x + run(partial(self.attend, mask=mask), x, again=self.recompute == "attention")
        if part is LayerPart.ATTENTION:
            return x, None, None
        output = run(self.feed, x, again=self.recompute == "experts")
        if isinstance(output, tuple):
            return x + output[0], output[1], output[2]
        return x + output, None, None

    def attend(self, x: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        """x [B, S, H] -> [B, S, H], what attention adds to it"""
        added = _with_bias(self.attention(x if self.norms_after else self.attention_norm(x), mask), self.attention.output)
        return self.attention_norm(added) if self.norms_after else added

    def feed(self, x: torch.Tensor) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """x [B, S, H] -> what is to be added to x, and for a mixture the other two results of `MixtureOfExperts`"""
        result: torch.Tensor | tuple[torch.Tensor, torch.Tensor, torch.Tensor]
        result = self.feed_forward(x if self.norms_after else self.feed_forward_norm(x))
        if isinstance(result, tuple):
            return (self.feed_forward_norm(result[0]), *result[1:]) if self.norms_after else result
        added = _with_bias(result, self.feed_forward.down) if isinstance(self.feed_forward, FeedForward) else result
        return self.feed_forward_norm(added) if self.norms_after else added


def _with_bias(added: torch.Tensor, last: Linear) -> torch.Tensor:
    """Adds the bias, if there is one, of the last linear layer of a block to the block's output. That happens here, outside of the
    block, because the block's own output may be one of several parts that are summed."""
    return added if last.bias is None else plus_bias(added, last.bias)


class Decoder(Model):
    """Slices of the model's layers, in order; with `first` the embedding, and its norm if it has one, before the first slice, with
    `last` the final norm and the head after the last one. Of a layer in which a slice begins or ends, only a half may be here.

    Layers keep the number they have in the whole model, so a parameter's name is the same wherever it lies.
    """

    def __init__(
        self,
        config: ModelConfig,
        slices: Sequence[LayerSlice],
        first: bool = True,
        last: bool = True,
        recompute: Sequence[str] = (),
        offload_bytes: int = 0,
        operators: OperatorSet = BY_RULE,
    ) -> None:
        """`recompute`: for each layer of the whole model, the part that its backward pass computes again: none, attention, experts
        or full; empty: none. `offload_bytes`: the most bytes of the layers' activations that may be in host memory."""
        super().__init__()
        self.slices = [one.parts() for one in slices]
        """For each slice, what it computes of each of its layers."""
        self._held = parts_of(slices)
        self.recompute = list(recompute) or ["none"] * config.layers
        self.host_memory = HostMemory(offload_bytes)
        self.embedding = Embedding(config) if first else None
        self.embedding_norm = norm_of(config, operators) if first and config.embedding_norm else None
        self.layers = nn.ModuleDict(
            {str(i): Layer(config, i, self.recompute[i], operators, part) for i, part in self._held.items()}
        )
        self.norm = norm_of(config, operators) if last else None
        self.head = Head(config.padded_vocab, config.hidden, config.vocab, operators) if last else None
        self._tied = config.tie_embeddings and first and last
        if self.head is not None and self.embedding is not None and self._tied:
            self.head.weight = self.embedding.weight
        self._bias_rate = config.moe.bias_rate
        self._loads: dict[int, torch.Tensor] = {}
        """By the number of the layer, how many tokens each of its experts [E] got since `begin_step`; filled only if there are
        biases to change."""
        self._counted: dict[int, torch.Tensor] | None = None
        """The same within `counting_loads`; None outside."""

    @property
    def units(self) -> list[nn.Module]:
        units = (self.embedding, self.embedding_norm, *self.layers.values(), self.norm, self.head)
        return [unit for unit in units if unit is not None]

    def reads_weights_again(self, unit: nn.Module) -> bool:
        return unit is not self.embedding and unit is not self.head  # the head's gradients are computed in the forward pass

    def uses(self, parameter: nn.Parameter) -> int:
        """Returns how many gradients `parameter` gets per micro-batch: 2 for a weight that is both embedding and head, else 1."""
        return 2 if self._tied and self.embedding is not None and parameter is self.embedding.weight else 1

    @contextmanager
    def counting_loads(self) -> Iterator[dict[int, torch.Tensor]]:
        self._counted = {}
        try:
            yield self._counted
        finally:
            self._counted = None

    def begin_step(self) -> None:
        self._loads.clear()

    def end_step(self, group: Group) -> None:
        loads = {i: load for i, load in self._loads.items() if self.get_parameter(f"{_router(i)}.weight").requires_grad}
        if self._bias_rate and loads:
            update_biases(
                summed(torch.stack(list(loads.values())), group),
                [self.get_buffer(f"{_router(index)}.bias") for index in loads],
                self._bias_rate,
            )

    def forward(
        self,
        inputs: torch.Tensor,
        labels: torch.Tensor | None = None,
        chunk: int = 0,
        documents: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Runs the slice at index `chunk` on tokens [B, S] or hidden states [B, S, H]. Returns the hidden states, or after the head
        the loss summed over tokens (the logits if there are no labels), and the sum of the slice's balance losses.

        `documents` [B, S]: the position at which the document of each token begins in its row; tokens attend to their document
        only, whose positions count from 0. None: a row is one document."""
        x = inputs
        if chunk == 0 and self.embedding is not None:
            positions = () if documents is None else (positions_in(documents),)
            x = self.call(self.embedding, x, *positions)
            if self.embedding_norm is not None:
                x = self.call(self.embedding_norm, x)
        mask = () if documents is None else (document_mask(documents, multiply_dtype(x)),)
        balance = x.new_zeros((), dtype=accurate_dtype(x.dtype))
        saving = self.host_memory.begin_pass()
        for index, part in self.slices[chunk].items():
            layer = self.layers[str(index)]
            others = mask if part is self._held[index] else (*(mask or (None,)), part)
            with saving():
                x, loss, load = run(partial(_first, self.call, layer, others), x, again=self.recompute[index] == "full")
            if loss is not None:
                balance = balance + loss
            loads = self._counted if not torch.is_grad_enabled() else self._loads if self._bias_rate else None
            if load is not None and loads is not None:
                loads[index] = loads.get(index, 0) + load
        if self.head is not None and self.norm is not None and chunk == len(self.slices) - 1:
            x = self.call(self.head, self.call(self.norm, x), labels)
        return x, balance


def _first(call: Callable[..., Any], unit: nn.Module, others: tuple[Any, ...], x: torch.Tensor) -> Any:
    """Calls `unit` with x and then `others`."""
    return call(unit, x, *others)


def _router(layer: int) -> str:
    return f"layers.{layer}.feed_forward.router"

"""Measures how well a model predicts text.

Shapes: B sequences, S tokens of a sequence.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from bagualu.parallel.vocabulary import IGNORED
from bagualu.trainer.data.config import STREAM
from bagualu.trainer.data.tokenised import bits_per_byte
from bagualu.trainer.generation.stages import Stages

Sequences = Callable[[int], tuple[torch.Tensor, ...]]
"""Returns the tensors [1, S] of the sequence with a number, as `Batches.validation` does."""


@dataclass(frozen=True)
class TextLoss:
    """The cross-entropy of a text."""

    nats: float
    """Summed over all tokens that are predicted."""
    tokens: int
    text_bytes: int
    """Bytes of text that the predicted tokens stand for; 0 for random tokens."""

    def as_dict(self) -> dict[str, float | int | None]:
        """Returns `loss` (nats per token), `perplexity`, `bits_per_byte` (None for random tokens) and `tokens`."""
        loss = self.nats / max(1, self.tokens)
        perplexity = math.exp(loss) if loss < 700 else math.inf
        bits = bits_per_byte(self.nats, self.text_bytes)
        return {"loss": loss, "perplexity": perplexity, "bits_per_byte": bits, "tokens": self.tokens}


@torch.no_grad()
def text_loss(stages: Stages, sequences: Sequences, numbers: list[int], token_bytes: NDArray[np.int64]) -> TextLoss:
    """Returns the loss of the sequences with these `numbers`, the same on every rank. `token_bytes` [V]: the bytes of text of each
    token. Collective."""
    device = stages.mesh.group("world").device
    sizes = torch.as_tensor(token_bytes, device=device)
    sums = [torch.zeros((), dtype=torch.float64, device=device) for _ in range(3)]
    for tensors in _share(stages, sequences, numbers):
        labels = tensors[1]
        loss = stages.loss(*(tensor.to(device) for tensor in tensors))
        counted = labels[labels != IGNORED].to(device)
        values = (0 if loss is None else loss, counted.numel(), sizes[counted].sum())
        if stages.mesh.last_stage and stages.mesh.reports:  # every stage and tensor rank has the labels, but only one counts
            for total, value in zip(sums, values, strict=True):
                total += value
    nats, tokens, text_bytes = stages.mesh.sum_over("world", *sums)
    return TextLoss(nats, round(tokens), round(text_bytes))


def _share(stages: Stages, sequences: Sequences, numbers: list[int]) -> Iterator[list[torch.Tensor]]:
    """Yields the tensors [B, S] of this data rank's share of the sequences, as often on every rank. Rows that fill up the
    last batches have labels that the loss ignores."""
    size, ranks, own = stages.recipe.train.micro_batch, stages.mesh.layout.data, stages.mesh.at("data")
    for start in range(0, len(numbers), size * ranks):
        rows = [sequences(number) for number in numbers[start + own * size : start + (own + 1) * size]]
        shape = (size, stages.recipe.data.sequence_length)
        whole = [torch.zeros(shape, dtype=torch.int64), torch.full(shape, IGNORED)]
        if stages.recipe.data.packing != STREAM:
            whole.append(torch.zeros(shape, dtype=torch.int64))
        for row, tensors in enumerate(rows):
            for together, tensor in zip(whole, tensors, strict=True):
                together[row] = tensor[0]
        yield whole

"""Documents that share a row have the losses and gradients that each has alone."""

from itertools import pairwise
from typing import Any

import pytest
import torch

from bagualu.trainer.models.decoder.model import Decoder
from tests.covering import in_turns
from tests.trainer.models.decoder.test_model import VARIANTS, config_of, filled

BORDERS = [[0, 3, 4, 11, 16], [0, 6, 12, 14, 16]]
"""Of the documents in two rows of 16 tokens. None is longer than the 8 positions that the learned ones have here."""


def packed(vocab: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Tokens, labels and where documents begin [2, 16]."""
    tokens = torch.randint(0, vocab, (2, 17), generator=torch.Generator().manual_seed(7))
    labels, begins = tokens[:, 1:].clone(), torch.zeros(2, 16, dtype=torch.int64)
    for row, borders in enumerate(BORDERS):
        for begin, end in pairwise(borders):
            begins[row, begin:end] = begin
            labels[row, end - 1] = -100
    return tokens[:, :-1], labels, begins


def losses(model: Decoder, *inputs: Any) -> torch.Tensor:
    loss, _ = model(*inputs)
    return loss


def alone(model: Decoder, tokens: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """The sum of the losses of all documents, each in a row of its own."""
    spans = [(row, slice(*span)) for row, borders in enumerate(BORDERS) for span in pairwise(borders)]
    return torch.stack([losses(model, tokens[row : row + 1, span], labels[row : row + 1, span]) for row, span in spans]).sum()


def gradients(model: Decoder, loss: torch.Tensor) -> dict[str, torch.Tensor]:
    model.zero_grad()
    loss.backward()  # type: ignore[no-untyped-call]
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@in_turns(variant=list(VARIANTS), recompute=["none", "attention", "full"])
def test_a_document_has_the_same_loss_alone_and_packed(variant: str, recompute: str) -> None:
    config = config_of(variant)
    if config.positions == "learned":
        config.max_positions = 8
    model = filled(config, torch.float64, [recompute] * config.layers)
    tokens, labels, begins = packed(config.vocab)
    together, apart = losses(model, tokens, labels, 0, begins), alone(model, tokens, labels)
    torch.testing.assert_close(together, apart, rtol=1e-10, atol=0)
    assert (
        abs(losses(model, tokens[:, :8], labels[:, :8], 0) - losses(model, tokens[:, :8], labels[:, :8], 0, begins[:, :8])) > 1e-6
    )
    ours, expected = gradients(model, together), gradients(model, apart)
    assert ours.keys() == expected.keys()
    for name, gradient in expected.items():
        if name.endswith("key.bias") and config.positions != "rotary":  # softmax takes it out: rounding errors are left
            assert max(gradient.abs().max(), ours[name].abs().max()) < 1e-10
            continue
        torch.testing.assert_close(ours[name], gradient, rtol=1e-9, atol=1e-9 * float(gradient.abs().max()), msg=name)


@pytest.mark.parametrize("variant", ["dense", "alibi", "grouped_query"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2), (torch.float16, 3e-3)])
def test_so_it_is_in_every_dtype(variant: str, dtype: torch.dtype, tolerance: float) -> None:
    model = filled(config_of(variant), dtype)
    tokens, labels, begins = packed(24)
    together, apart = losses(model, tokens, labels, 0, begins), alone(model, tokens, labels)
    torch.testing.assert_close(together, apart, rtol=tolerance, atol=0)

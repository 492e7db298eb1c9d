"""A decoder that only continues sequences computes the logits that it did before, with as few bytes of weights."""

import pytest
import torch

from bagualu.parallel.pipeline.layer_slice import LayerSlice
from bagualu.trainer.models.decoder.cache import cached
from bagualu.trainer.models.decoder.frozen import freeze
from bagualu.trainer.models.decoder.model import Decoder
from bagualu.trainer.operators.packed import can_pack
from tests.parity import small_recipe

MODELS: dict[str, dict[str, object]] = {
    "rotary": {"model__kv_heads": 2, "model__vocab": 61},
    "query and key norms, bias": {"model__qk_norm": True, "model__bias": "attention", "model__kv_heads": 2},
    "learned, no gate": {
        "model__positions": "learned", "model__max_positions": 32, "model__bias": "all", "model__norm": "layer",
        "model__activation": "gelu",
    },
    "tied": {"model__positions": "alibi", "model__tie_embeddings": True},
    "mixture": {"model__moe__experts": 4, "model__moe__ffn": 8, "model__moe__every": 2, "model__moe__shared_experts": 1},
}  # fmt: skip
TOLERANCES = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2**-5}


def decoder(name: str, dtype: torch.dtype) -> tuple[Decoder, int]:
    """The model, and the size of its vocabulary."""
    config = small_recipe(**MODELS[name]).model
    torch.manual_seed(1)
    model = Decoder(config, [LayerSlice.of_layers(range(config.layers))])
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, 0.5 if parameter.dim() == 1 else 0.0, 0.2)
    return model.to(dtype), config.vocab


def logits(model: Decoder, tokens: torch.Tensor, pieces: tuple[int, ...]) -> torch.Tensor:
    """The logits after the last token, given the tokens in pieces."""
    padding = torch.tensor([0, 2])
    with torch.no_grad(), cached(model, padding) as columns:
        for piece in tokens.split(pieces, 1):
            with columns.adding(piece.shape[1], piece.shape[1]):
                result: torch.Tensor = model(piece)[0]
    return result.double()


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("name", MODELS)
def test_logits_are_those_before(name: str, dtype: torch.dtype) -> None:
    model, vocab = decoder(name, dtype)
    tokens = torch.randint(vocab, (2, 9), generator=torch.Generator().manual_seed(2))
    before = [logits(model, tokens, pieces) for pieces in ((9,), (6, 1, 2))]
    size = sum(parameter.numel() for parameter in model.parameters())
    freeze(model)
    for pieces, wanted in zip(((9,), (6, 1, 2)), before, strict=True):
        found = logits(model, tokens, pieces)
        assert float((found - wanted).norm() / wanted.norm()) < TOLERANCES[dtype]
    if can_pack(torch.zeros(1, 1, dtype=dtype)):
        assert sum(parameter.numel() for parameter in model.parameters()) < size / 2, "packed weights take the place of others"


def test_weights_that_are_not_packed_are_parts_of_joined_ones() -> None:
    model, _ = decoder("rotary", torch.float64)
    freeze(model)
    attention = model.layers["0"].attention
    assert attention.query.frozen is not None
    assert {layer.weight.untyped_storage().data_ptr() for layer in (attention.query, attention.key, attention.value)} == {
        attention.query.frozen.weight.untyped_storage().data_ptr()
    }

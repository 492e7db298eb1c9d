"""Logits with a cache of keys and values are those without, for every kind of positions and layers."""

from dataclasses import replace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from bagualu.parallel.pipeline.layer_slice import LayerSlice
from bagualu.trainer.models.decoder import cache
from bagualu.trainer.models.decoder.cache import cached
from bagualu.trainer.models.decoder.config import ModelConfig, MoEConfig
from bagualu.trainer.models.decoder.model import Decoder
from bagualu.trainer.operators.rotary import RotaryPositions, Scaling

SMALL = ModelConfig(layers=2, hidden=24, heads=4, kv_heads=2, ffn=32, vocab=50)
MODELS = {
    "rotary": SMALL,
    "learned": replace(SMALL, positions="learned", max_positions=40, norm="layer", activation="gelu", bias="all"),
    "alibi": replace(SMALL, positions="alibi", kv_heads=None, embedding_norm=True),
    "alibi, grouped heads": replace(SMALL, positions="alibi"),
    "no positions": replace(SMALL, positions="none", kv_heads=1),
    "normalised heads": replace(SMALL, qk_norm=True, head_dim=8, bias="attention", tie_embeddings=True),
    "window": replace(SMALL, window=3),
    "window and alibi": replace(SMALL, window=4, full_attention_every=2, positions="alibi"),
    "scaled rotations": replace(SMALL, rope_scaling="llama3", rope_original_positions=16, norm_position="after"),
    "norms over all heads": replace(SMALL, qk_norm=True, qk_norm_over="all"),
    "mixture": replace(SMALL, moe=MoEConfig(experts=4, top_k=2, ffn=16, shared_experts=1, every=2, bias_rate=0.0)),
}
LENGTHS = (11, 3, 7)
"""The tokens of three prompts, which are continued by STEPS tokens each."""
STEPS = 6


def a_model(config, dtype=torch.float64):
    torch.manual_seed(0)
    model = Decoder(config, [LayerSlice.of_layers(range(config.layers))]).to(dtype)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model


def of_cache(model, sequences, parts, width=1):
    """The logits [sequences, V] after each part of all sequences, given in turn; `width` as in `Columns.adding`, at least."""
    lengths = torch.tensor([len(sequence) for sequence in sequences])
    longest = int(lengths.max())
    padded = torch.stack([torch.cat((torch.full((longest - len(s),), 9), s)) for s in sequences])
    logits, done = [], 0
    with torch.no_grad(), cached(model, longest - lengths) as columns:
        for part in parts:
            tokens = padded[:, done : done + part]
            tokens = torch.cat((tokens.new_full((len(tokens), max(0, width - part)), 5), tokens), 1)
            with columns.adding(part, tokens.shape[1]):
                logits.append(model(tokens)[0][:, -1])
            done += part
    return logits


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("elements", [2**24, 1000])
def test_logits_are_those_without_a_cache(name, elements, monkeypatch):
    """Also where masks are made for a few tokens at a time."""
    monkeypatch.setattr(cache, "_MASK_ELEMENTS", elements)
    model = a_model(MODELS[name])
    whole = [torch.randint(50, (length + STEPS,)) for length in LENGTHS]
    with torch.no_grad():
        wanted = [model(sequence.unsqueeze(0))[0][0] for sequence in whole]
    for parts in ([max(LENGTHS), *[1] * STEPS], [max(LENGTHS) + 2, 1, STEPS - 3]):
        for logits, end in zip(of_cache(model, whole, parts), torch.tensor(parts).cumsum(0).tolist(), strict=True):
            missing = max(LENGTHS) + STEPS - end
            torch.testing.assert_close(logits, torch.stack([w[-1 - missing] for w in wanted]), rtol=1e-9, atol=1e-9)
    with torch.no_grad():
        again = [model(sequence.unsqueeze(0))[0][0] for sequence in whole]
    assert all(map(torch.equal, again, wanted)), "the model is as before"


def test_columns_before_the_tokens_of_a_pass_change_nothing():
    """Sequence parallelism needs such columns, because its ranks have to divide their number."""
    model = a_model(MODELS["mixture"])
    whole = [torch.randint(50, (length,)) for length in LENGTHS]
    parts = [8, 1, 2]
    for narrow, wide in zip(of_cache(model, whole, parts), of_cache(model, whole, parts, width=4), strict=True):
        torch.testing.assert_close(wide, narrow, rtol=1e-12, atol=1e-12)


class Largest(TorchDispatchMode):
    """Notes the most elements that a result of an operator has."""

    def __init__(self):
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple) else (result,):
            if isinstance(tensor, torch.Tensor):
                self.elements = max(self.elements, tensor.untyped_storage().nbytes() // tensor.itemsize)
        return result


@pytest.mark.parametrize("name", ["rotary", "window", "window and alibi"])
@pytest.mark.parametrize("lengths", [(2000,), (2000, 1900)])
def test_no_mask_is_as_large_as_the_square_of_a_prompt(name, lengths, monkeypatch):
    monkeypatch.setattr(cache, "_MASK_ELEMENTS", 2**18)
    model = a_model(replace(MODELS[name], window=MODELS[name].window and 100))
    with Largest() as largest:
        of_cache(model, [torch.randint(50, (length,)) for length in lengths], [max(lengths)])
    assert largest.elements < max(lengths) ** 2 / 4


def test_a_cache_grows_while_it_is_in_use_and_its_padding_is_never_seen(monkeypatch):
    model = a_model(MODELS["rotary"])
    whole = [torch.randint(50, (length,)) for length in (9, 5)]
    wanted = of_cache(model, whole, [9])
    monkeypatch.setattr(cache, "GROWTH", 2)
    parts = [4, 1, 1, 3]
    torch.testing.assert_close(of_cache(model, whole, parts)[-1], wanted[0], rtol=1e-12, atol=1e-12)
    other = [torch.cat((torch.tensor([7]), whole[0][1:])), whole[1]]
    first, second = of_cache(model, other, parts)[-1]
    assert not torch.allclose(first, wanted[0][0])
    torch.testing.assert_close(second, wanted[0][1], rtol=1e-12, atol=1e-12)


def test_caches_have_a_multiple_of_64_columns():
    columns = cache.Columns(torch.tensor([0]))
    for added, capacity in ((1, 64), (63, 64), (1, 128), (200, 320)):
        with columns.adding(added, added):
            ((_, mask),) = columns.masks(1, None, torch.float32, None)
            assert (columns.capacity, mask.shape[-1]) == (capacity, capacity)


def test_what_all_layers_share_is_computed_once_in_a_pass():
    """Masks by window, angles by what they depend on; and none of it is that of the pass before."""
    columns = cache.Columns(torch.tensor([0]))
    layers = [RotaryPositions(8, 1e4), RotaryPositions(8, 1e4), RotaryPositions(8, 1e4, Scaling(2.0))]
    angles = [cache._angles(columns, positions) for positions in layers]
    before = None
    for added in (3, 1, 1):
        with columns.adding(added, added):
            masks = [next(columns.masks(1, window, torch.float32, None))[1] for window in (None, None, 2)]
            assert masks[0] is masks[1]
            assert not torch.equal(masks[0], masks[2])
            same, again, other = (of_layer(added, torch.float32, torch.device("cpu"))[0] for of_layer in angles)
            assert same is again
            assert not torch.equal(same, other)
            assert before is None or not torch.equal(same, before)
            before = same


def test_half_precision_is_close():
    model = a_model(MODELS["rotary"], torch.float32)
    whole = [torch.randint(50, (length,)) for length in LENGTHS]
    wanted = of_cache(model, whole, [9, 1, 1])[-1]
    model = model.to(torch.bfloat16)
    logits = of_cache(model, whole, [9, 1, 1])[-1]
    assert logits.dtype == torch.float32
    assert (logits - wanted).norm() < 0.03 * wanted.norm()

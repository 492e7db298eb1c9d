"""The decoder's plan covers every parameter of every variant, and its boxes make up every tensor on every layout."""

from fnmatch import fnmatchcase

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bagualu.comm.errors import RecipeError
from bagualu.parallel.boxes import cover_problem
from bagualu.parallel.layout import Layout
from bagualu.parallel.pipeline.layer_slice import LayerSlice
from bagualu.parallel.sharding import Placement, ShardingPlan
from bagualu.trainer.models.decoder.config import ModelConfig, MoEConfig
from bagualu.trainer.models.decoder.model import Decoder
from bagualu.trainer.models.decoder.plan import decoder_plan
from tests.trainer.models.styles import STYLES

SIZES = {"layers": 4, "hidden": 16, "heads": 4, "ffn": 24, "vocab": 64}
VARIANTS = {
    "dense": ModelConfig(**SIZES),
    "grouped_tied": ModelConfig(**SIZES, kv_heads=4, tie_embeddings=True),
    "moe": ModelConfig(**SIZES, moe=MoEConfig(experts=8, ffn=8)),
    "moe_every_2_shared": ModelConfig(**SIZES, moe=MoEConfig(experts=8, ffn=8, every=2, shared_experts=2, bias_rate=0.1)),
    **{style: ModelConfig(**SIZES, **changes) for style, changes in STYLES.items()},
}
SPLIT = {  # what each kind of parameter has to look like on tensor 2 x expert 4, of its whole shape
    "embedding.weight": (32, 16), "head.weight": (32, 16), "norm.weight": (16,),
    "attention_norm.weight": (16,), "feed_forward_norm.weight": (16,),
    "embedding.positions.weight": (160, 16), "norm.bias": (16,),
    "embedding_norm.weight": (16,), "embedding_norm.bias": (16,), "attention_norm.bias": (16,), "feed_forward_norm.bias": (16,),
    "attention.query.weight": (8, 16), "attention.key.weight": (8, 16), "attention.value.weight": (8, 16),
    "attention.output.weight": (16, 8), "feed_forward.gate.weight": (12, 16), "feed_forward.up.weight": (12, 16),
    **{f"attention.{part}.bias": (8,) for part in ("query", "key", "value")}, "attention.output.bias": (16,),
    **{f"attention.{part}_norm.weight": (8,) for part in ("query", "key")},  # over all heads
    "feed_forward.up.bias": (12,), "feed_forward.down.bias": (16,),
    "feed_forward.down.weight": (16, 12), "feed_forward.router.weight": (8, 16),
    "feed_forward.experts.gate": (2, 4, 16), "feed_forward.experts.up": (2, 4, 16), "feed_forward.experts.down": (2, 16, 4),
    "feed_forward.shared.gate.weight": (8, 16), "feed_forward.shared.up.weight": (8, 16),
    "feed_forward.shared.down.weight": (16, 8),
}  # fmt: skip

WIDE = {  # with heads of 12 elements instead of 4
    **{f"attention.{part}.weight": (24, 16) for part in ("query", "key", "value")}, "attention.output.weight": (16, 24),
    **{f"attention.{part}_norm.weight": (12,) for part in ("query", "key")},
}  # fmt: skip


def model_of(config: ModelConfig) -> Decoder:
    with torch.device("meta"):
        return Decoder(config, [LayerSlice.of_layers(range(config.layers))])


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_parameter_is_placed_as_intended(variant: str) -> None:
    config, layout = VARIANTS[variant], Layout(data=4, tensor=2, expert=4)
    plan = decoder_plan(config, sequence=False)
    for name, parameter in model_of(config).named_parameters():
        box = plan.placement(name).box(name, tuple(parameter.shape), layout, layout.coordinates(3))
        split = SPLIT | (WIDE if config.head_dim else {})
        assert box.shape == split[name.split(".", 2)[-1] if name.startswith("layers.") else name], name
        assert plan.placement(name).reduction_axis == ("replica" if "experts" in name else "fold")


@pytest.mark.parametrize("sequence", [False, True])
def test_which_gradients_are_partial_over_the_tensor_axis(sequence: bool) -> None:
    names = {name for config in VARIANTS.values() for name, _ in model_of(config).named_parameters()}
    plan = decoder_plan(VARIANTS["moe_every_2_shared"], sequence)
    for name in names:
        sliced = name.endswith(("norm.weight", "norm.bias", "output.bias", "down.bias")) or name == "embedding.positions.weight"
        partial = name.endswith(("router.weight", "query_norm.weight", "key_norm.weight")) or (sequence and sliced)
        assert plan.placement(name).partial_over == ("tensor" if partial else None), name
    for part in ("query", "key"):  # each rank has the whole gradient of its elements
        assert decoder_plan(VARIANTS["olmo3"], sequence).placement(f"layers.0.attention.{part}_norm.weight").partial_over is None


def test_no_pattern_of_the_plan_is_dead() -> None:
    names, modules = set(), set()
    for config in VARIANTS.values():
        model = model_of(config)
        names |= {name for name, _ in [*model.named_parameters(remove_duplicate=False), *model.named_buffers()]}
        modules |= {name for name, _ in model.named_modules()}
    plan = decoder_plan(VARIANTS["moe"], sequence=True)
    first = {next(pattern for pattern, _ in plan.placements if fnmatchcase(name, pattern)) for name in names}
    assert first == {pattern for pattern, _ in plan.placements}
    for pattern, _ in plan.boundaries:
        assert any(fnmatchcase(module, pattern) for module in modules), pattern
    for module in modules:
        assert sum(fnmatchcase(module, pattern) for pattern, _ in plan.boundaries) <= 1, module


@settings(deadline=None, max_examples=40)
@given(st.sampled_from(sorted(VARIANTS)), st.sampled_from([1, 2, 4]), st.sampled_from([1, 2, 4, 8]), st.data())
def test_boxes_of_the_ranks_that_count_make_up_every_tensor(variant: str, tensor: int, fold: int, data: st.DataObject) -> None:
    config = VARIANTS[variant]
    divisors = [n for n in (1, 2, 4, 8) if fold % n == 0] if config.moe.experts else [1]
    layout = Layout(data=fold, tensor=tensor, expert=data.draw(st.sampled_from(divisors)))
    plan = decoder_plan(config, sequence=False)
    model = model_of(config)
    for name, parameter in [*model.named_parameters(), *model.named_buffers()]:
        placement = plan.placement(name)
        boxes = []
        for rank in range(layout.world):
            at = layout.coordinates(rank)
            if placement.counted(layout, at) and at[placement.reduction_axis] == 0:
                boxes.append(placement.box(name, tuple(parameter.shape), layout, at))
        assert cover_problem(tuple(parameter.shape), boxes) is None, name


def test_a_tied_head_goes_by_the_name_of_the_embedding() -> None:
    assert decoder_plan(VARIANTS["grouped_tied"], False).global_name("head.weight") == "embedding.weight"
    assert decoder_plan(VARIANTS["dense"], False).global_name("head.weight") == "head.weight"


def test_a_dim_that_does_not_divide_and_a_parameter_nobody_placed_are_errors() -> None:
    layout = Layout(tensor=3)
    with pytest.raises(RecipeError, match=r"w \[8, 2\] cannot be split .* over tensor 3; give parallel.tensor a divisor of 8"):
        Placement(((0, "tensor"),)).box("w", (8, 2), layout, layout.coordinates(0))
    with pytest.raises(KeyError, match="no pattern of the sharding plan covers stray"):
        ShardingPlan((("w*", Placement()),)).placement("stray")

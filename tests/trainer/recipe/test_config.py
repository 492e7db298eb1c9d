"""What cannot work is refused in one line with the fix, and doing what the line says is then accepted."""

from typing import Any

import pytest

from bagualu.comm.errors import RecipeError
from bagualu.parallel.pipeline.registry import SCHEDULES
from bagualu.trainer.recipe.config import Recipe
from tests.parity import small_recipe

MOE: dict[str, Any] = {"model__moe__experts": 4, "model__moe__ffn": 8}
FSDP: dict[str, Any] = {"parallel__engine": "fsdp", "parallel__bucket_bytes": 25 * 2**20}
LEARNED = {"model__positions": "learned", "model__max_positions": 8}
YARN: dict[str, Any] = {"model__rope_scaling": "yarn"}
MUON: dict[str, Any] = {"optim__name": "muon"}
VECTOR, MATRICES = ({"pattern": pattern, "optimizer": "muon"} for pattern in ("*norm.weight", "*.query.weight"))

# what is wrong, the fix as the message says it, what to change
CASES: list[tuple[dict[str, Any], str, dict[str, Any]]] = [
    # parallel
    ({"parallel__tensor": 0}, "give parallel.tensor=1", {"parallel__tensor": 1}),
    ({"parallel__data": -2}, "give parallel.data=1", {"parallel__data": 1}),
    ({"parallel__context": 2}, "give parallel.context=1", {"parallel__context": 1}),
    ({"parallel__schedule": "zigzag"}, "give one of gpipe, 1f1b", {"parallel__schedule": "gpipe"}),
    ({"parallel__zero": 4}, "give parallel.zero=0, 1, 2 or 3", {"parallel__zero": 3}),
    (
        {"parallel__zero": 2, "parallel__data": 2, "parallel__shares": [3, 5]},
        "leave it out, or give parallel.zero=1",
        {"parallel__zero": 1},
    ),
    (
        {"parallel__zero": 2, "parallel__data": 2, "parallel__shares": "measured"},
        "leave it out, or give parallel.zero=1",
        {"parallel__shares": None},
    ),
    # what the engine on torch's FSDP2 has not
    ({"parallel__engine": "torch"}, "give one of native, fsdp", FSDP),
    ({**FSDP, "parallel__zero": 1}, "give parallel.zero=3, or parallel.engine=native or deepspeed", {"parallel__engine": "native"}),
    (
        {**FSDP, "parallel__zero": 2, "train__dtype": "float32"},
        "give parallel.zero=3, or parallel.engine=native or deepspeed",
        {"parallel__engine": "deepspeed"},
    ),
    ({**FSDP, "parallel__zero": 0}, "give parallel.zero=3, or parallel.engine=native", {"parallel__zero": 3}),
    ({"parallel__engine": "fsdp"}, "give parallel.bucket_bytes=26214400", {"parallel__bucket_bytes": 26214400}),
    ({**FSDP, "comm__backend": "simulated"}, "give parallel.engine=native or comm.backend=gloo", {"comm__backend": "gloo"}),
    ({**FSDP, "comm__backend": "simulated"}, "give parallel.engine=native", {"parallel__engine": "native"}),
    (
        {**FSDP, "parallel__pipeline": 2, "parallel__schedule": "zb_h1"},
        "give parallel.schedule=1f1b or parallel.engine=native",
        {"parallel__schedule": "1f1b"},
    ),
    (
        {**FSDP, "parallel__pipeline": 2, "parallel__schedule": "dualpipe_v"},
        "parallel.engine=native",
        {"parallel__engine": "native"},
    ),
    ({**FSDP, "faults": ["flip@step=2"]}, "give what=master", {"faults": ["flip@step=2:what=master"]}),
    ({**FSDP, "faults": ["flip@step=2:what=weight"]}, "or parallel.engine=native", {"parallel__engine": "native"}),
    (
        {**FSDP, "parallel__zero": 3, "parallel__data": 2, "parallel__shares": [3, 5], "train__dtype": "float32"},
        "give parallel.zero=1 with parallel.engine=native or deepspeed",
        {"parallel__zero": 1, "parallel__engine": "deepspeed"},
    ),
    ({**FSDP, "parallel__data": 2, "parallel__shares": "measured"}, "leave it out", {"parallel__shares": None}),
    ({"parallel__data": 4, "parallel__shard": 2}, "has no effect with parallel.engine=native; leave it out", FSDP),
    ({**FSDP, "parallel__data": 4, "parallel__shard": 1}, "must be at least 2 ranks; leave it out", {"parallel__shard": None}),
    ({**FSDP, "parallel__data": 4, "parallel__shard": 3}, "data x context = 4; give one of [2, 4]", {"parallel__shard": 4}),
    ({**FSDP, "parallel__data": 1, "parallel__shard": 2}, "leave it out", {"parallel__shard": None}),
    (
        {**FSDP, **MOE, "data__global_batch": 12, "parallel__data": 12, "parallel__expert": 4, "parallel__shard": 6},
        "give one of [2, 3, 4, 12]",
        {"parallel__shard": 4},
    ),
    ({"parallel__bucket_bytes": 0}, "e.g. parallel.bucket_bytes=26214400", {"parallel__bucket_bytes": 26214400}),
    ({"parallel__sequence": True}, "raise parallel.tensor", {"parallel__tensor": 2}),
    ({"parallel__data": 4, "parallel__expert": 3, **MOE}, "give one of [1, 2, 4]", {"parallel__expert": 4}),
    ({"parallel__pipeline": 5}, "give parallel.pipeline=4 or less", {"parallel__pipeline": 4}),
    ({"parallel__pipeline": 3, "parallel__balance": [2, 2]}, "e.g. parallel.balance=[1,2,1]", {"parallel__balance": [1, 2, 1]}),
    ({"parallel__pipeline": 2, "parallel__balance": "best"}, "give uniform", {"parallel__balance": "uniform"}),
    # batch
    ({"data__global_batch": 6, "parallel__data": 4}, "give data.global_batch=8", {"data__global_batch": 8}),
    (
        {"data__global_batch": 6, "parallel__data": 4, "train__micro_batch": 3},
        "give data.global_batch=12",
        {"data__global_batch": 12},
    ),
    ({"train__micro_batch": 3, "parallel__data": 2}, "give one of [1, 2, 4]", {"train__micro_batch": 4}),
    (
        {"data__sequence_length": 9, "parallel__tensor": 2, "parallel__sequence": True},
        "change one of them",
        {"data__sequence_length": 10},
    ),
    # what the tensor axis has to divide
    ({"parallel__tensor": 3}, "give parallel.tensor one of [1, 2, 4]", {"parallel__tensor": 4}),
    (
        {"model__heads": 8, "model__kv_heads": 2, "parallel__tensor": 4},
        "give parallel.tensor one of [1, 2]",
        {"parallel__tensor": 2},
    ),
    ({"model__ffn": 27, "parallel__tensor": 2}, "give parallel.tensor one of [1]", {"parallel__tensor": 1}),
    ({**MOE, "model__moe__ffn": 6, "parallel__tensor": 4}, "or change model.moe.ffn", {"model__moe__ffn": 8}),
    # experts
    ({"parallel__expert": 2}, "give parallel.expert=1", {"parallel__expert": 1}),
    ({**MOE, "model__moe__experts": 5, "parallel__expert": 2}, "give model.moe.experts=6", {"model__moe__experts": 6}),
    ({**MOE, "model__moe__top_k": 5}, "give model.moe.top_k=4", {"model__moe__top_k": 4}),
    ({**MOE, "model__moe__top_k": 0}, "give model.moe.top_k=1", {"model__moe__top_k": 1}),
    ({**MOE, "model__moe__every": 5}, "give at most 4", {"model__moe__every": 4}),
    ({**MOE, "model__moe__every": 0}, "at least 1, e.g. model.moe.every=1", {"model__moe__every": 1}),
    ({**MOE, "model__moe__experts": -4}, "model.moe.experts=-4 must be at least 0", {"model__moe__experts": 4}),
    ({**MOE, "model__moe__balance_loss": -0.1}, "balance_loss=-0.1 must be at least 0", {"model__moe__balance_loss": 0.0}),
    ({**MOE, "model__moe__router": "hash"}, "give model.moe.router=softmax", {"model__moe__router": "softmax"}),
    ({"model__moe__shared_experts": 1}, "no effect with model.moe.experts=0", {"model__moe__experts": 4}),
    ({"model__moe__top_k": 1}, "or give model.moe.top_k=2", {"model__moe__top_k": 2}),
    ({"optim__decay_fraction": 0.5}, "no effect with optim.schedule=cosine", {"optim__schedule": "wsd"}),
    ({"optim__schedule": "constant", "optim__final_lr_ratio": 0.0}, "optim.schedule=constant", {"optim__schedule": "wsd"}),
    # model
    ({"model__hidden": 18}, "give model.hidden=24", {"model__hidden": 24}),
    ({"model__hidden": 20}, "give model.hidden=24", {"model__hidden": 24}),
    ({"model__kv_heads": 3}, "give one of [1, 2, 4]", {"model__kv_heads": 2}),
    ({"model__norm": "batch"}, "give one of rms, layer", {"model__norm": "layer"}),
    ({"model__activation": "relu"}, "give one of swiglu, gelu", {"model__activation": "gelu"}),
    ({"model__positions": "rope"}, "give one of rotary, learned, alibi, none", {"model__positions": "none"}),
    ({"model__bias": "qkv"}, "give one of none, attention, all", {"model__bias": "attention"}),
    ({"model__positions": "alibi", "model__rope_theta": 1e6}, "or give model.rope_theta=10000.0", {"model__positions": "rotary"}),
    ({"model__positions": "learned"}, "give e.g. model.max_positions=2048", {"model__max_positions": 2048}),
    ({**LEARNED, "model__max_positions": 7}, "give model.max_positions=8", {"model__max_positions": 8}),
    ({**LEARNED, "model__max_positions": 0}, "must be at least 1", {"model__max_positions": 8}),
    ({"model__max_positions": 8}, "change model.positions or leave it out", LEARNED),
    ({"model__positions": "alibi", "data__sequence_length": 2**16 + 1}, "give shorter sequences", {"data__sequence_length": 2**16}),
    ({"model__hidden": 18}, "or model.head_dim", {"model__head_dim": 4}),
    ({"model__head_dim": 5}, "model.head_dim=5 must be even for rotary positions; give model.head_dim=6", {"model__head_dim": 6}),
    ({"model__head_dim": 0}, "must be at least 1, or leave it out", {"model__head_dim": None}),
    ({"model__qk_norm_over": "all"}, "change model.qk_norm or give model.qk_norm_over=head", {"model__qk_norm": True}),
    ({"model__window": 0}, "model.window=0 must be at least 1", {"model__window": 1}),
    ({"model__full_attention_every": 2}, "no effect with model.window=null; change model.window or", {"model__window": 4}),
    (
        {"model__window": 4, "model__full_attention_every": 1},
        "give model.full_attention_every=2 or more",
        {"model__full_attention_every": 2},
    ),
    ({"model__rope_factor": 4.0}, "change model.rope_scaling or give model.rope_factor=8.0", {"model__rope_scaling": "llama3"}),
    (
        {"model__rope_scaling": "llama3", "model__rope_low_frequency_factor": 4.0},
        "give e.g. model.rope_low_frequency_factor=1.0",
        {"model__rope_low_frequency_factor": 1.0},
    ),
    (
        {**YARN, "model__rope_high_frequency_factor": 8.0},
        "no effect with model.rope_scaling=yarn; change model.rope_scaling or give model.rope_high_frequency_factor=4.0",
        {"model__rope_scaling": "llama3"},
    ),
    ({"model__rope_scaling": "linear", "model__rope_beta_fast": 8.0}, "no effect with model.rope_scaling=linear", YARN),
    ({**YARN, "model__rope_beta_fast": 1.0}, "give e.g. model.rope_beta_slow=0.25", {"model__rope_beta_slow": 0.25}),
    ({**YARN, "model__rope_attention_factor": 0.0}, "must be positive, or leave it out", {"model__rope_attention_factor": 1.0}),
    ({**YARN, "model__rope_theta": 1.0}, "must be above 1 for model.rope_scaling=yarn", {"model__rope_theta": 10.0}),
    ({**YARN, "model__rope_scaled_layers": "full"}, "no effect with model.window=null", {"model__rope_scaled_layers": "all"}),
    (
        {**YARN, "model__rope_scaled_layers": "full", "model__window": 4},
        "model.rope_scaled_layers=full scales no layer",
        {"model__full_attention_every": 2},
    ),
    (
        {"model__positions": "none", "model__rope_scaling": "llama3"},
        "no effect with model.positions=none",
        {"model__positions": "rotary"},
    ),
    ({"model__layers": 0}, "model.layers=0 must be at least 1", {"model__layers": 1}),
    ({"model__vocab_multiple": 0}, "must be at least 1", {"model__vocab_multiple": 1}),
    # training
    ({"train__dtype": "fp32"}, "give one of float64, float32, bfloat16, float16", {"train__dtype": "float32"}),
    ({"train__recompute": "some"}, "give one of none, full, auto", {"train__recompute": "full"}),
    ({"train__recompute": True}, "train.recompute=true is unknown; give one of none", {"train__recompute": "none"}),
    ({"optim__name": "lion", "operators__update": "generated"}, "operators.update=generated is an update by AdamW, which "
     "optim.name=lion does not use; leave it out", {"operators__update": "auto"}),
    ({"train__recompute": "every:0"}, "e.g. train.recompute=every:2", {"train__recompute": "every:2"}),
    ({"train__recompute": "every:two"}, "must be every:N with N of at least 1", {"train__recompute": "every:1"}),
    ({"train__recompute": "bytes:1e9"}, "e.g. train.recompute=bytes:1073741824", {"train__recompute": "bytes:1073741824"}),
    ({"train__recompute": "bytes:-5"}, "must be bytes:N with N of at least 1", {"train__recompute": "bytes:5"}),
    ({"train__recompute": "experts"}, "give train.recompute=attention or full", {"train__recompute": "attention"}),
    ({"train__recompute": "experts"}, "or model.moe.experts", MOE),
    ({"train__recompute": [3, 4, 1]}, "layers from 0 to 3, each once; give train.recompute=[1,3]", {"train__recompute": [1, 3]}),
    ({"train__recompute": [2, 2]}, "give train.recompute=[2]", {"train__recompute": [2]}),
    ({"train__recompute": None}, "train.recompute=null is unknown; give one of none", {"train__recompute": "none"}),
    ({"train__recompute": [-1]}, "give train.recompute=[0,1]", {"train__recompute": [0, 1]}),
    ({"train__recompute": ["a"]}, "train.recompute=[a] must name layers from 0 to 3", {"train__recompute": [0, 1]}),
    ({"train__recompute": ["attention"]}, "give train.recompute=attention or full", {"train__recompute": "attention"}),
    ({"train__recompute": ["attention", "experts"]}, "give train.recompute=attention or full", {"train__recompute": "full"}),
    ({**MOE, "train__recompute": ["experts"]}, "give train.recompute=experts or full", {"train__recompute": "experts"}),
    ({"train__recompute": []}, "give train.recompute=none", {"train__recompute": "none"}),
    ({"train__recompute": [True, "0", 0.0, 1]}, "give train.recompute=[1]", {"train__recompute": [1]}),
    ({"train__offload_bytes": -1}, "e.g. train.offload_bytes=1073741824", {"train__offload_bytes": 1073741824}),
    ({"train__offload_bytes": -1}, "or leave it out", {"train__offload_bytes": 0}),
    ({"train__steps": 0}, "must be at least 1", {"train__steps": 1}),
    ({"train__compile": 1}, "train.compile=1 must be true, false or auto", {"train__compile": False}),
    ({"train__compile": "yes"}, "train.compile=yes must be true, false or auto", {"train__compile": "auto"}),
    ({"train__micro_batch": 0}, "must be at least 1", {"train__micro_batch": 1}),
    ({"train__validate_every": -1}, "must be at least 0", {"train__validate_every": 0}),
    ({"train__sample_every": -1}, "must be at least 0", {"train__sample_every": 0}),
    ({"optim__name": "adam"}, "give one of adamw, lion, muon, sgd", {"optim__name": "adamw"}),
    ({**MUON, "optim__adjust_lr": "rms"}, "give one of match_rms_adamw, original", {"optim__adjust_lr": "original"}),
    ({"optim__adjust_lr": "original"}, "give optim.adjust_lr=match_rms_adamw", {"optim__adjust_lr": "match_rms_adamw"}),
    ({**MUON, "optim__groups": [VECTOR]}, "give a pattern of matrices", {"optim__groups": [MATRICES]}),
    ({"optim__groups": [MATRICES]}, "give optim.name=muon", MUON),
    ({"optim__schedule": "linear"}, "give one of cosine, wsd, constant", {"optim__schedule": "wsd"}),
    ({"optim__betas": [0.9, 1.0]}, "e.g. optim.betas=[0.9,0.95]", {"optim__betas": [0.9, 0.95]}),
    ({"optim__betas": [0.9]}, "e.g. optim.betas=[0.9,0.95]", {"optim__betas": [0.9, 0.95]}),
    ({"optim__lr": -1.0}, "e.g. optim.lr=0.001", {"optim__lr": 0.001}),
    ({"optim__final_lr_ratio": 2.0}, "must lie between 0 and 1", {"optim__final_lr_ratio": 1.0}),
    # pipelines and balance
    (
        {"parallel__pipeline": 2, "parallel__virtual_stages": 2},
        "does not go with parallel.schedule=1f1b; give parallel.virtual_stages=1",
        {"parallel__virtual_stages": 1},
    ),
    (
        {"parallel__pipeline": 2, "parallel__schedule": "zb_v", "model__layers": 3},
        "parallel.virtual_stages=2 stages each are more than model.layers=3; give parallel.pipeline=1 or less",
        {"parallel__pipeline": 1},
    ),
    ({"parallel__pipeline": 2, "parallel__balance": "even"}, "give uniform, analytic, measured or a list of 2 layer counts",
     {"parallel__balance": "analytic"}),
    (
        {"parallel__pipeline": 2, "parallel__speeds": "measured"},
        "no effect with parallel.balance=uniform",
        {"parallel__balance": "measured"},
    ),
    ({"parallel__balance": "measured"}, "no effect with parallel.pipeline=1", {"parallel__pipeline": 2}),
    ({"parallel__balance": "analytic"}, "give parallel.balance=uniform", {"parallel__balance": "uniform"}),
    ({"parallel__memory_bytes": 0}, "must be a positive number of bytes", {"parallel__memory_bytes": 2**30}),
    ({"train__recompute": "auto"}, "give parallel.memory_bytes=BYTES", {"parallel__memory_bytes": 2**30}),
    ({"parallel__rebalance__every": 5}, "has no effect with parallel.pipeline=1", {"parallel__pipeline": 2}),
    ({"parallel__rebalance__threshold": 0.0}, "e.g. parallel.rebalance.threshold=0.05", {"parallel__rebalance__threshold": 0.05}),
    ({"parallel__data": 2, "parallel__shares": [5, 4]}, "e.g. parallel.shares=[4,4]", {"parallel__shares": [4, 4]}),
    ({"parallel__data": 2, "parallel__shares": "even"}, "must be measured or hold 2 counts", {"parallel__shares": "measured"}),
    (
        {"parallel__data": 8, "parallel__shares": "measured", "train__micro_batch": 2},
        "give a smaller train.micro_batch, or parallel.data=4 or less",
        {"parallel__data": 4},
    ),
    # nothing given
    ({"run__dir": " "}, "e.g. run.dir=runs/tiny", {"run__dir": "runs/tiny"}),
    ({"run__name": ""}, "e.g. run.name=tiny", {"run__name": "tiny"}),
    # far too large
    ({"run__seed": 99999999999999999999999}, "e.g. run.seed=4135583743", {"run__seed": 4135583743}),
    ({"run__seed": 2**64}, "must lie between -2**63 and 2**64 - 1", {"run__seed": 2**64 - 1}),
    ({"run__seed": -(2**63) - 1}, "must lie between -2**63 and 2**64 - 1", {"run__seed": -(2**63)}),
    ({"data__global_batch": 10**12}, "must be at most 16777216", {"data__global_batch": 2**16}),
    ({"data__sequence_length": 10**12}, "give data.sequence_length=16777216 or less", {"data__sequence_length": 2**24}),
    ({"model__layers": 10**9}, "give model.layers=16384 or less", {"model__layers": 2**14}),
    ({"model__ffn": 10**12}, "give model.ffn=16777216 or less", {"model__ffn": 2**24}),
    ({**MOE, "model__moe__experts": 10**9}, "give model.moe.experts=16777216 or less", {"model__moe__experts": 4}),
    # the rest
    ({"data__global_batch": 0}, "must be at least 1", {"data__global_batch": 1}),
    ({"data__split": "lines"}, "give one of share, files", {"data__split": "files"}),
    ({"data__source": "caf\udce9"}, "has a name that is not UTF-8; rename it", {"data__source": "caf\u00e9"}),
    ({"data__validation_fraction": 1.0}, "e.g. 0.05", {"data__validation_fraction": 0.05}),
    ({"comm__device": "gpu"}, "give cpu or cuda", {"comm__device": "cpu"}),
    (
        {"comm__device": "cuda"},
        "leave comm.device out, or give comm.backend=nccl",
        {"comm__device": "cpu", "comm__backend": "nccl"},
    ),
    (
        {"train__deterministic": False, "comm__backend": "gloo"},
        "leave it out, or give comm.backend=nccl",
        {"comm__backend": "nccl"},
    ),
    (
        {"train__deterministic": False, "comm__backend": "nccl", "guard__audit_every": 5},
        "give guard.audit_every=0",
        {"guard__audit_every": 0},
    ),
    ({"comm__timeout_seconds": 0.0}, "e.g. comm.timeout_seconds=600", {"comm__timeout_seconds": 600.0}),
    ({"checkpoint__every": -1}, "e.g. checkpoint.every=100", {"checkpoint__every": 100}),
    ({"checkpoint__timeout_seconds": 0.0}, "or leave it out", {"checkpoint__timeout_seconds": None}),
    ({"checkpoint__timeout_seconds": 301.0}, "give 300 or less", {"checkpoint__timeout_seconds": 300.0}),
    ({"checkpoint__keep": 0}, "must be at least 1", {"checkpoint__keep": 1}),
    ({"launch__workers": 0}, "must be at least 1", {"launch__workers": 1}),
    ({"launch__threads": 0}, "or leave it out", {"launch__threads": None}),
    ({"launch__allocator": "jemalloc"}, "give tuned or system", {"launch__allocator": "system"}),
    ({"launch__slurm__cpus_per_task": -8}, "or leave it out", {"launch__slurm__cpus_per_task": None}),
    ({"launch__slurm__gpus_per_node": 0}, "must be at least 1", {"launch__slurm__gpus_per_node": 1}),
    ({"launch__port": 70000}, "or leave it out", {"launch__port": None}),
    ({"log__wandb": "on"}, "give disabled, offline or online", {"log__wandb": "offline"}),
    ({"log__progress": "dots"}, "give auto, bar, lines or off", {"log__progress": "lines"}),
    ({"restart__hang_seconds": -1}, "e.g. restart.hang_seconds=300", {"restart__hang_seconds": 300}),
    ({"restart__hang_seconds": 3600}, "e.g. restart.long_hang_seconds=3600", {"restart__long_hang_seconds": 3600}),
    (
        {"restart__hang_seconds": 0, "restart__long_hang_seconds": 60},
        "give restart.long_hang_seconds=1800",
        {"restart__long_hang_seconds": 1800},
    ),
    # operators
    ({"operators__attention": "flash"}, "give one of auto, blocks, kernel", {"operators__attention": "kernel"}),
    ({"operators__loss": "exact"}, "give one of auto, eager", {"operators__loss": "auto"}),
    (
        {"operators__attention": "blocks", "comm__backend": "nccl"},
        "is for cpu only, and the ranks compute on cuda; give one of auto, kernel",
        {"operators__attention": "kernel"},
    ),
    ({"straggler__ratio": 0.5}, "or 0 to turn it off, e.g. straggler.ratio=1.5", {"straggler__ratio": 0}),
    ({"straggler__window_seconds": 0}, "e.g. straggler.window_seconds=10", {"straggler__window_seconds": 10}),
    (
        {"straggler__ratio": 0, "straggler__window_seconds": 60},
        "give straggler.window_seconds=10",
        {"straggler__window_seconds": 10},
    ),
    ({"log__every": 0}, "must be at least 1", {"log__every": 1}),
]  # fmt: skip


def ranks(recipe: Recipe) -> int:
    return max(1, recipe.world_size())


@pytest.mark.parametrize(("wrong", "said", "fix"), CASES, ids=[" ".join(f"{k}={v}" for k, v in w.items()) for w, *_ in CASES])
def test_refused_with_a_fix_that_works(wrong: dict[str, Any], said: str, fix: dict[str, Any]) -> None:
    recipe = small_recipe(**wrong)
    with pytest.raises(RecipeError) as error:
        recipe.validate(ranks(recipe))
    assert said in str(error.value)
    assert "\n" not in str(error.value)
    assert any(key.replace("__", ".") in str(error.value) for key in [*wrong, *fix])
    repaired = small_recipe(**{**wrong, **fix})
    repaired.validate(ranks(repaired))


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize(
    "given", [{}, {"train__micro_batch": 2}, {"parallel__data": 2}, {"parallel__data": 2, "parallel__shares": "measured"}]
)
def test_only_so_many_micro_batches_are_planned_for(schedule: str, given: dict[str, Any]) -> None:
    pipeline = {"parallel__pipeline": 2, "parallel__schedule": schedule, **given}
    recipe = small_recipe(data__global_batch=2**18, **pipeline)
    with pytest.raises(RecipeError, match=r"more than 65536; give data.global_batch=(\d+) or less") as error:
        recipe.validate(ranks(recipe))
    most = int(str(error.value).split("data.global_batch=")[-1].split()[0])
    assert most == 2**16 * given.get("train__micro_batch", 1) * given.get("parallel__data", 1)
    small_recipe(data__global_batch=most, **pipeline).validate(ranks(recipe))


@pytest.mark.parametrize(
    ("degrees", "world", "said", "instead"),
    [
        ({"tensor": 2, "pipeline": 2}, 6, "6 ranks do not divide into tensor 2 x pipeline 2 x context 1 = 4; use 4 ranks", 4),
        ({"tensor": 2, "pipeline": 2}, 3, "use 4 ranks", 4),
        ({"tensor": 2, "data": 2}, 8, "needs 4 ranks but the world has 8; use 4 ranks or leave parallel.data out", 4),
        ({"tensor": 4, "data": 2}, 4, "use 8 ranks", 8),
    ],
)
def test_a_world_that_does_not_fit_the_layout(degrees: dict[str, int], world: int, said: str, instead: int) -> None:
    recipe = small_recipe(**{f"parallel__{axis}": degree for axis, degree in degrees.items()})
    with pytest.raises(RecipeError) as error:
        recipe.validate(world)
    assert said in str(error.value)
    assert recipe.validate(instead).world == instead


def test_the_data_degree_is_what_the_world_leaves_over() -> None:
    recipe = small_recipe(parallel__tensor=2, parallel__pipeline=2)
    assert [recipe.validate(world).data for world in (4, 8, 16)] == [1, 2, 4]
    assert recipe.world_size() == 4
    assert small_recipe(parallel__tensor=2, parallel__expert=4, **MOE).world_size() == 8
    assert small_recipe(launch__workers=3, launch__nodes=2).world_size() == 6


def test_a_dense_models_ffn_is_not_asked_for_where_every_layer_is_a_mixture() -> None:
    small_recipe(**MOE, model__moe__every=1, model__ffn=27, parallel__tensor=2).validate(2)


def test_a_balance_may_come_as_any_sequence() -> None:
    small_recipe(parallel__pipeline=2, parallel__balance=(1, 3)).validate(2)

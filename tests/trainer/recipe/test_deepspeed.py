"""What DeepSpeed cannot do, and a file of its configuration that contradicts the recipe, is refused in one line with the fix."""

import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest

from bagualu.comm.errors import RecipeError
from bagualu.parallel.config import DeepSpeedConfig, ParallelConfig
from bagualu.trainer.recipe.config import Recipe
from bagualu.trainer.recipe.deepspeed import VERSION, require_deepspeed
from tests.parity import small_recipe

MOE: dict[str, Any] = {"model__moe__experts": 4, "model__moe__ffn": 8}


def recipe_for(**changes: Any) -> Recipe:
    return small_recipe(**{"train__dtype": "float32", "parallel__engine": "deepspeed", **changes})


def settings(**keys: Any) -> dict[str, Any]:
    return {"parallel__deepspeed": DeepSpeedConfig(**keys)}


# what is wrong, the fix as the message says it, what to change
CASES: list[tuple[dict[str, Any], str, dict[str, Any]]] = [
    ({"parallel__zero": 0}, "give parallel.zero=1, 2 or 3, or parallel.engine=native", {"parallel__zero": 3}),
    ({"comm__backend": "simulated"}, "give comm.backend=gloo or parallel.engine=native", {"comm__backend": "gloo"}),
    ({"train__dtype": "float64"}, "or train.dtype=float32", {"train__dtype": "float32"}),
    ({"train__dtype": "float16"}, "give train.dtype=bfloat16 or parallel.engine=native", {"train__dtype": "bfloat16"}),
    (
        {"parallel__pipeline": 2, "parallel__schedule": "zb_h1"},
        "give parallel.schedule=1f1b or parallel.engine=native",
        {"parallel__schedule": "1f1b"},
    ),
    (
        {"parallel__pipeline": 2, "parallel__zero": 2},
        "give parallel.zero=1 or parallel.engine=native",
        {"parallel__engine": "native"},
    ),
    ({"parallel__pipeline": 2, "parallel__zero": 3}, "give parallel.zero=1 or", {"parallel__zero": 1}),
    (
        {"parallel__schedule": "gpipe", "parallel__zero": 2},
        "give parallel.schedule=1f1b or parallel.engine=native",
        {"parallel__schedule": "1f1b"},
    ),
    (
        {"parallel__schedule": "interleaved_1f1b", "parallel__zero": 3},
        "give parallel.schedule=1f1b or parallel.engine=native or fsdp",
        {"parallel__schedule": "1f1b"},
    ),
    ({"optim__name": "muon"}, "give optim.name=adamw or parallel.engine=native or fsdp", {"optim__name": "adamw"}),
    (
        {"optim__name": "muon", "parallel__zero": 2},
        "give optim.name=adamw or parallel.engine=native",
        {"parallel__engine": "native"},
    ),
    (
        {**MOE, "parallel__data": 2, "parallel__expert": 2, "parallel__zero": 3},
        "give parallel.zero=2, parallel.expert=1 or parallel.engine=native",
        {"parallel__zero": 2},
    ),
    (
        {"parallel__zero": 3, "parallel__data": 2, "parallel__shares": [3, 5]},
        "leave it out, or give parallel.zero=1",
        {"parallel__zero": 1},
    ),
    ({"parallel__zero": 3, "faults": ["flip@step=2"]}, "give what=master or parallel.zero=2", {"parallel__zero": 2}),
    ({"parallel__zero": 3, "faults": ["flip@step=2"]}, "give what=master", {"faults": ["flip@step=2:what=master"]}),
    (settings(offload="disk"), "give one of none, optimizer, parameters", settings(offload="optimizer")),
    (
        {**settings(offload="parameters"), "parallel__zero": 2},
        "give parallel.zero=3 or parallel.deepspeed.offload=optimizer",
        {"parallel__zero": 3},
    ),
    (
        {**settings(offload="optimizer"), "parallel__engine": "native"},
        "change parallel.engine or give parallel.deepspeed.offload=none",
        {"parallel__engine": "deepspeed"},
    ),
    (
        {**settings(config="a.json"), "parallel__engine": "native"},
        "change parallel.engine or leave it out",
        settings(),
    ),
    (settings(config="/nowhere/a.json"), "give a file of DeepSpeed's configuration in JSON", settings()),
]  # fmt: skip


@pytest.mark.parametrize(("wrong", "said", "fix"), CASES)
def test_what_deepspeed_cannot_do_is_refused_with_the_fix(wrong: dict[str, Any], said: str, fix: dict[str, Any]) -> None:
    recipe = recipe_for(**wrong)
    with pytest.raises(RecipeError) as error:
        recipe.validate(recipe.world_size())
    assert said in str(error.value)
    assert "\n" not in str(error.value)
    repaired = recipe_for(**{**wrong, **fix})
    repaired.validate(repaired.world_size())


@pytest.mark.parametrize("wrong", [case[0] for case in CASES])
def test_every_engine_that_a_refusal_names_can_do_it(wrong: dict[str, Any]) -> None:
    with pytest.raises(RecipeError) as error:
        recipe_for(**wrong).validate(recipe_for(**wrong).world_size())
    _, fix = str(error.value).split("; ")
    for name in re.findall(r"(?:parallel\.engine=| or )(native|fsdp)\b", fix):
        other = recipe_for(**{**wrong, "parallel__engine": name, "parallel__bucket_bytes": ParallelConfig.bucket_bytes})
        other.validate(other.world_size())


def with_file(tmp_path: Path, content: Any, **changes: Any) -> Recipe:
    path = tmp_path / "ds.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return recipe_for(**{**settings(config=str(path)), "parallel__data": 2, "train__micro_batch": 2, **changes})


AGREES: dict[str, Any] = {
    "train_batch_size": 8,
    "train_micro_batch_size_per_gpu": "auto",
    "gradient_accumulation_steps": 2,
    "gradient_clipping": 0.05,
    "steps_per_print": 100,
    "optimizer": {"type": "Adam", "params": {"lr": 0.01, "betas": [0.9, 0.95], "eps": 1e-8, "weight_decay": "auto"}},
    "bf16": {"enabled": False},
    "zero_optimization": {
        "stage": 2,
        "overlap_comm": True,
        "contiguous_gradients": True,
        "reduce_bucket_size": 5e8,
        "sub_group_size": 1e9,
        "offload_optimizer": {"device": "none", "pin_memory": True},
    },
}
"""A file as people have it."""


def test_a_file_that_agrees_is_passed_on(tmp_path: Path) -> None:
    recipe = with_file(tmp_path, AGREES, parallel__zero=2)
    config = recipe.deepspeed_terms(recipe.validate(2)).library_config()
    assert config["steps_per_print"] == 100
    assert config["zero_optimization"]["reduce_bucket_size"] == 5e8
    assert config["zero_optimization"]["overlap_comm"]
    assert config["zero_optimization"]["offload_optimizer"] == {"device": "none", "pin_memory": True}
    assert "optimizer" not in config


# the file, the recipe, what is said of each key
DIFFERENT: list[tuple[dict[str, Any], dict[str, Any], list[str]]] = [
    (
        {"train_batch_size": 16, "gradient_clipping": 1.0, "zero_optimization": {"stage": 3}},
        {},
        [
            "train_batch_size=16 but data.global_batch=8;",
            "gradient_clipping=1.0 but optim.clip_norm=0.05;",
            "zero_optimization.stage=3 but parallel.zero=1;",
        ],
    ),
    ({"train_micro_batch_size_per_gpu": 1}, {}, ["train_micro_batch_size_per_gpu=1 but train.micro_batch=2"]),
    (
        {"gradient_accumulation_steps": 4},
        {},
        [
            "gradient_accumulation_steps=4 but data.global_batch=8 with train.micro_batch=2 is 2 on each of 2 data ranks",
        ],
    ),
    (
        {"gradient_accumulation_steps": 2},
        {"restart__elastic": True},
        ["gradient_accumulation_steps=2 but the number is not the same for all data ranks (parallel.shares) or all starts"],
    ),
    ({"gradient_accumulation_steps": 2}, {"parallel__shares": [3, 1]}, ["gradient_accumulation_steps=2 but the number is not"]),
    (
        {"optimizer": {"type": "Lamb", "params": {"lr": 1e-4, "betas": [0.9, 0.999], "weight_decay": 0.0, "adam_w_mode": False}}},
        {},
        [
            'optimizer.type="Lamb" but optim.name=adamw;',
            "optimizer.params.lr=0.0001 but optim.lr=0.01",
            "optimizer.params.betas=[0.9, 0.999] but optim.betas=[0.9, 0.95]",
            "optimizer.params.weight_decay=0.0 but optim.weight_decay=0.1",
            "optimizer.params.adam_w_mode=false but optim.name=adamw",
        ],
    ),
    (
        {"scheduler": {"type": "WarmupLR", "params": {"warmup_num_steps": 10}}},
        {},
        ['scheduler.type="WarmupLR" but optim.schedule=cosine'],
    ),
    (
        {"bf16": {"enabled": True}, "fp16": {"enabled": True}},
        {},
        ["bf16.enabled=true but train.dtype=float32", "fp16.enabled=true but train.dtype=float32"],
    ),
    ({"optimizer": {"type": "Muon", "params": {"lr": 0.01}}}, {}, ['optimizer.type="Muon" but optim.name=adamw']),
    (
        {"optimizer": {"type": "SGD", "params": {"lr": 0.01, "momentum": 0.8, "betas": [0.9, 0.999]}}},
        {"optim__name": "sgd", "optim__weight_decay": 0.0},
        ["optimizer.params.momentum=0.8 but optim.momentum=0.9", "optimizer.params.betas=[0.9, 0.999] but optim.name=sgd has none"],
    ),
    ({"bf16": {"enabled": False}}, {"train__dtype": "bfloat16"}, ["bf16.enabled=false but train.dtype=bfloat16"]),
    ({"communication_data_type": "bf16"}, {}, ['communication_data_type="bf16" but gradients are added in float32']),
    (
        {"zero_optimization": {"overlap_comm": True}},
        {},
        [
            "zero_optimization.overlap_comm=true but parallel.zero=1 with train.dtype=float32 adds gradients in float32 only "
            "without it (leave it out)"
        ],
    ),
    (
        {"zero_optimization": {"contiguous_gradients": True}},
        {"train__dtype": "bfloat16", "parallel__zero": 2},
        ["zero_optimization.contiguous_gradients=true but parallel.zero=2 with train.dtype=bfloat16"],
    ),
    (
        {"zero_optimization": {"offload_optimizer": {"device": "cpu"}, "offload_param": {"device": "cpu"}}},
        {"parallel__zero": 3},
        [
            'zero_optimization.offload_optimizer.device="cpu" but parallel.deepspeed.offload=none',
            'zero_optimization.offload_param.device="cpu" but parallel.deepspeed.offload=none',
        ],
    ),
    (
        {"zero_optimization": {"sub_group_size": 100}},
        {"parallel__zero": 3},
        ["zero_optimization.sub_group_size=100 but the model has"],
    ),
]


@pytest.mark.parametrize(("content", "changes", "said"), DIFFERENT)
def test_each_key_that_contradicts_the_recipe_is_named(
    tmp_path: Path, content: dict[str, Any], changes: dict[str, Any], said: list[str]
) -> None:
    recipe = with_file(tmp_path, content, **changes)
    with pytest.raises(RecipeError, match="contradicts the recipe") as error:
        recipe.validate(2)
    assert [text for text in said if text not in str(error.value)] == []
    assert str(error.value).count(" but ") == len(said)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("{", "cannot be read"),
        ("[]", "holds no JSON object"),
        ("[" * 200_000, "nested too deep"),
        ('{"a":' * 200_000, "nested too deep"),
        ({"gradient_cliping": 1.0}, "gradient_cliping (did you mean gradient_clipping?); leave them out of the file"),
        ({"zero_optimization": {"zero_quantized_weights": True}}, "cannot be used here: zero_optimization.zero_quantized_weights"),
        ({"compression_training": {"weight_quantization": {}, "x": 1}}, "cannot be used here: compression_training.x;"),
        ({"fp16": {"enable": True}}, "fp16.enable (did you mean fp16.enabled?)"),
        ({"tensorboard": {"enabled": True, "path": "x"}}, "cannot be used here: tensorboard.path"),
        ({"a\nb": [[1]], "train_batch_size": [[8]]}, "train_batch_size=[...] but data.global_batch=8"),
        ({f"k{number}": 1 for number in range(100)}, "; and 80 more; leave them out"),
        (
            {"activation_checkpointing": {"partition_activations": True, "profile": True}, "wandb": {"enabled": True}},
            "cannot be used here: activation_checkpointing, which is decided by train.recompute of the recipe; wandb, which is "
            "decided by log.wandb of the recipe; leave",
        ),
    ],
    ids=lambda one: str(one)[:30],
)
def test_a_key_that_has_no_place_here_is_refused(tmp_path: Path, content: Any, said: str) -> None:
    with pytest.raises(RecipeError) as error:
        with_file(tmp_path, content).validate(2)
    assert said in str(error.value)
    assert "\n" not in str(error.value)


def test_one_message_names_all_that_is_wrong(tmp_path: Path) -> None:
    content = {
        "train_batch_size": 16,
        "steps_per_print": "often",
        "zero_optimization": {"reduce_bucket_size": "huge", "overlap_comm": "yes", "unknown": 1},
        "amp": {"enabled": "auto"},
    }
    with pytest.raises(RecipeError) as error:
        with_file(tmp_path, content, parallel__zero=2).validate(2)
    for said in (
        "ds.json contradicts the recipe: train_batch_size=16 but data.global_batch=8; make",
        '. It has values that DeepSpeed cannot use: steps_per_print="often" is not a whole number of at least 1; ',
        'zero_optimization.reduce_bucket_size="huge" is not a whole number of at least 1; ',
        'zero_optimization.overlap_comm="yes" is not true or false; ',
        ". It has keys that cannot be used here: zero_optimization.unknown",
        "amp, which is decided by train.dtype of the recipe",
    ):
        assert said in str(error.value)


@pytest.mark.parametrize(
    ("key", "values"),
    [
        ("steps_per_print", [0, -1, 1.5, True, float("nan"), float("inf"), [1]]),
        ("wall_clock_breakdown", [1, "true"]),
        ("log_level", ["INFO", 3]),
        ("comms_logger.prof_ops", ["all_reduce", [1]]),
        ("flops_profiler.module_depth", [-2]),
        ("flops_profiler.recompute_fwd_factor", [-0.5, "0"]),
        ("tensorboard.output_path", [1]),
        ("zero_optimization.stage3_max_live_parameters", [-1, 2**63]),
        ("zero_optimization.allgather_bucket_size", [0, 3]),
        ("zero_optimization.offload_optimizer.pin_memory", ["no"]),
    ],
)
def test_a_value_that_deepspeed_cannot_use_is_refused(tmp_path: Path, key: str, values: list[Any]) -> None:
    for value in values:
        with pytest.raises(RecipeError, match=f"DeepSpeed cannot use: {key}="):
            with_file(tmp_path, nested(key, value)).validate(2)


def nested(key: str, value: Any) -> dict[str, Any]:
    """Returns the file that has `value` at `key`."""
    for section in reversed(key.split(".")):
        value = {section: value}
    return value


HUGGING_FACE: dict[str, Any] = {
    "fp16": {
        "enabled": "auto", "loss_scale": 0, "loss_scale_window": 1000, "initial_scale_power": 16, "hysteresis": 2,
        "min_loss_scale": 1,
    },
    "bf16": {"enabled": "auto"},
    "optimizer": {"type": "AdamW", "params": dict.fromkeys(("lr", "betas", "eps", "weight_decay"), "auto")},
    "zero_optimization": {
        "stage": 3, "offload_optimizer": {"device": "none", "pin_memory": True}, "offload_param": None, "overlap_comm": True,
        "contiguous_gradients": True, "sub_group_size": 1e9, "reduce_bucket_size": "auto", "stage3_prefetch_bucket_size": "auto",
        "stage3_param_persistence_threshold": "auto", "stage3_max_live_parameters": 1e9, "stage3_max_reuse_distance": 1e9,
        "stage3_gather_16bit_weights_on_model_save": True,
    },
    "gradient_accumulation_steps": "auto", "gradient_clipping": "auto", "steps_per_print": 2000, "train_batch_size": "auto",
    "train_micro_batch_size_per_gpu": "auto", "wall_clock_breakdown": False,
}  # fmt: skip
"""The file for ZeRO-3 that programs on Hugging Face's Trainer use, but for its scheduler."""


def test_a_file_for_hugging_face_s_trainer_agrees(tmp_path: Path) -> None:
    recipe = with_file(tmp_path, HUGGING_FACE, parallel__zero=3)
    terms = recipe.deepspeed_terms(recipe.validate(2))
    config = terms.library_config()
    assert config["zero_optimization"]["stage3_max_live_parameters"] == 1e9
    assert "fp16" not in config
    assert not {key for key in config["zero_optimization"] if key.startswith("stage3_gather")}
    assert len(terms.remarks()) == 1
    assert terms.remarks()[0].endswith('decides: optim.schedule=cosine, not DeepSpeed\'s default scheduler.type="none"')


def test_a_file_of_sgd_with_the_momentum_that_the_recipe_has_by_default_agrees(tmp_path: Path) -> None:
    content = {"optimizer": {"type": "SGD", "params": {"lr": 0.01, "momentum": 0.9, "weight_decay": 0.1}}}
    with_file(tmp_path, content, optim__name="sgd").validate(2)


# the file, the recipe, the values of the recipe that replace defaults of DeepSpeed
LEFT_OUT: list[tuple[dict[str, Any], dict[str, Any], list[str]]] = [
    ({"steps_per_print": 10}, {}, ["optim.clip_norm=0.05, not DeepSpeed's default gradient_clipping=1.0"]),
    ({"gradient_clipping": "auto"}, {}, []),
    ({"gradient_clipping": None}, {"optim__clip_norm": 1.0}, []),
    (
        {"gradient_clipping": 0.05, "optimizer": {"type": "AdamW", "params": {"lr": 0.01}}},
        {"optim__schedule": "constant", "optim__warmup_steps": 0},
        [
            "optim.betas=[0.9, 0.95], not DeepSpeed's default optimizer.params.betas=[0.9, 0.999]",
            "optim.weight_decay=0.1, not DeepSpeed's default optimizer.params.weight_decay=0.0",
        ],
    ),
    (
        {
            "gradient_clipping": 0.05,
            "optimizer": {"type": "Adam", "params": {"torch_adam": True, "lr": 0.01, "betas": [0.9, 0.999]}},
        },
        {"optim__betas": [0.9, 0.999], "optim__weight_decay": 0.0},
        [
            "optim.weight_decay=0.0, not DeepSpeed's default optimizer.params.weight_decay=0.01",
            'optim.schedule=cosine, not DeepSpeed\'s default scheduler.type="none"',
        ],
    ),
    (
        {"gradient_clipping": 0.05, "optimizer": {"type": "SGD"}},
        {
            "optim__name": "sgd",
            "optim__lr": 1e-3,
            "optim__weight_decay": 0.0,
            "optim__schedule": "constant",
            "optim__warmup_steps": 0,
        },
        ["optim.momentum=0.9, not DeepSpeed's default optimizer.params.momentum=0.0"],
    ),
]


@pytest.mark.parametrize(("content", "changes", "said"), LEFT_OUT)
def test_defaults_of_deepspeed_that_the_recipe_replaces_are_told(
    tmp_path: Path, content: dict[str, Any], changes: dict[str, Any], said: list[str]
) -> None:
    recipe = with_file(tmp_path, content, **changes)
    remarks = recipe.deepspeed_terms(recipe.validate(2)).remarks()
    assert [remark.split(" leaves out keys that the recipe decides: ")[1].split("; ") for remark in remarks] == [said] * bool(said)


def test_another_version_of_deepspeed_or_none_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    require_deepspeed()
    fix = f"type pip install 'deepspeed=={VERSION}', or give parallel.engine=native"
    metadata = tmp_path / "deepspeed-0.18.2.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: deepspeed\nVersion: 0.18.2\n")
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    with pytest.raises(RecipeError) as error:
        require_deepspeed()
    assert (
        str(error.value) == f"parallel.engine=deepspeed works with DeepSpeed {VERSION}, not with 0.18.2, which is installed; {fix}"
    )
    monkeypatch.setattr(sys, "path", [])
    with pytest.raises(RecipeError) as error:
        require_deepspeed()
    assert str(error.value) == f"parallel.engine=deepspeed needs DeepSpeed, which is not installed; {fix}"

"""Small random models of transformers, one or more of each family, and their logits."""

from pathlib import Path
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    MistralConfig,
    MixtralConfig,
    Olmo2Config,
    Olmo3Config,
    PreTrainedConfig,
    Qwen2Config,
    Qwen3Config,
    Qwen3MoeConfig,
)

SIZES = {"vocab_size": 96, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4, "num_attention_heads": 4,
         "num_key_value_heads": 2, "max_position_embeddings": 64, "rms_norm_eps": 1e-5}  # fmt: skip
LLAMA31 = {"rope_theta": 500000.0, "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
           "original_max_position_embeddings": 16}  # fmt: skip
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}
TOKENS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": None}


def configs() -> dict[str, PreTrainedConfig]:
    mixture = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "head_dim": 16}
    return {
        "llama": LlamaConfig(**SIZES, **TOKENS, rope_parameters=dict(LLAMA31)),
        "llama_linear": LlamaConfig(**SIZES, **TOKENS, rope_parameters={"rope_theta": 1e4, "rope_type": "linear", "factor": 4.0}),
        "llama_with_biases": LlamaConfig(**SIZES, **TOKENS, attention_bias=True, mlp_bias=True, tie_word_embeddings=True),
        "mistral": MistralConfig(**SIZES, **TOKENS, sliding_window=5, head_dim=12),
        "qwen2": Qwen2Config(**SIZES, **TOKENS, tie_word_embeddings=True),
        "qwen2_yarn": Qwen2Config(**SIZES | {"max_position_embeddings": 16}, **TOKENS, rope_parameters={"rope_theta": 1e6, **YARN}),
        "qwen2_with_a_window": Qwen2Config(**SIZES, **TOKENS, use_sliding_window=True, sliding_window=5, max_window_layers=0),
        "qwen3": Qwen3Config(**SIZES, **TOKENS, head_dim=16, rope_parameters={"rope_theta": 1e6, "rope_type": "default"}),
        "qwen3_yarn": Qwen3Config(**SIZES, **TOKENS, head_dim=16, rope_parameters={"rope_theta": 100.0, **YARN, "beta_fast": 2.0,
                                  "beta_slow": 0.5, "attention_factor": 1.3}),
        "olmo2": Olmo2Config(**SIZES, **TOKENS),
        "olmo3": Olmo3Config(**SIZES, **TOKENS, sliding_window=5),
        "olmo3_yarn": Olmo3Config(**SIZES, **TOKENS, sliding_window=5, rope_parameters={
                                  "full_attention": {"rope_theta": 5e5, **YARN},
                                  "sliding_attention": {"rope_theta": 5e5, "rope_type": "default"}}),
        "mixtral": MixtralConfig(**SIZES, **TOKENS, num_local_experts=4, num_experts_per_tok=2),
        "qwen3_moe": Qwen3MoeConfig(**SIZES, **TOKENS, **mixture, norm_topk_prob=True),
        "qwen3_moe_in_some_layers": Qwen3MoeConfig(**SIZES, **TOKENS, **mixture, decoder_sparse_step=2),
    }  # fmt: skip


NAMES = ("llama", "llama_linear", "llama_with_biases", "mistral", "qwen2", "qwen2_yarn", "qwen2_with_a_window", "qwen3",
         "qwen3_yarn", "olmo2", "olmo3", "olmo3_yarn", "mixtral", "qwen3_moe", "qwen3_moe_in_some_layers")  # fmt: skip


def publish(name: str, path: Path, dtype: torch.dtype = torch.float32, **how: Any) -> PreTrainedConfig:
    """Saves a random model, whose every parameter is felt, to `path`."""
    config = configs()[name]
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    draw = torch.Generator().manual_seed(1)
    for key, parameter in model.named_parameters():
        values = torch.randn(parameter.shape, generator=draw) * 0.2
        parameter.data.copy_((values + 1 if "norm" in key else values).to(dtype))
    model.to(dtype).save_pretrained(path, **how)
    return config


def tokens() -> torch.Tensor:
    return torch.randint(0, SIZES["vocab_size"], (2, 14), generator=torch.Generator().manual_seed(2))


class InFloat64(TorchFunctionMode):
    """Makes transformers compute in float64 also what it computes in float32 whatever the weights: norms, angles, softmax."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.Tensor.float:
            func = torch.Tensor.double
        wider = {torch.float32: torch.float64}
        args = [wider.get(value, value) if isinstance(value, torch.dtype) else value for value in args]
        kwargs = {
            key: wider.get(value, value) if isinstance(value, torch.dtype) else value for key, value in (kwargs or {}).items()
        }
        return func(*args, **kwargs)


def logits(path: Path, dtype: torch.dtype) -> torch.Tensor:
    """The logits [B, S, V] that transformers computes from the files at `path`."""
    with InFloat64() if dtype == torch.float64 else torch.no_grad():
        model = AutoModelForCausalLM.from_pretrained(path, dtype=dtype, attn_implementation="eager", experts_implementation="eager")
        with torch.no_grad():
            return model(tokens()).logits

"""Changes of the default model in the style of published models, which together use every option of the decoder."""

from typing import Any

STYLES: dict[str, dict[str, Any]] = {
    "llama": {},
    "gpt": {
        "norm": "layer",
        "activation": "gelu",
        "positions": "learned",
        "max_positions": 160,
        "tie_embeddings": True,
        "bias": "all",
    },
    "bloom": {
        "norm": "layer",
        "embedding_norm": True,
        "activation": "gelu",
        "positions": "alibi",
        "tie_embeddings": True,
        "bias": "all",
    },
    "mpt": {"norm": "layer", "activation": "gelu", "positions": "alibi"},
    "qwen2": {"bias": "attention"},
    "qwen3": {"head_dim": 12, "qk_norm": True},
    "no_positions": {"positions": "none"},
    "mistral": {"window": 3, "rope_scaling": "llama3", "rope_original_positions": 20},
    "olmo3": {"norm_position": "after", "qk_norm": True, "qk_norm_over": "all", "window": 4, "full_attention_every": 2,
              "rope_scaling": "yarn", "rope_scaled_layers": "full", "rope_original_positions": 20},
}  # fmt: skip

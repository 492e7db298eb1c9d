"""Changes of the default model in the style of published models, which together use every option of the decoder."""

from typing import Any

STYLES: dict[str, dict[str, Any]] = {
    "llama": {},
    "gpt": {"norm": "layer", "activation": "gelu"},
}

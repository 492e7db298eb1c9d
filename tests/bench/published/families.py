"""The models of published runs, by name: what a recipe must say of each family beside the sizes that a row gives."""

import re
from dataclasses import dataclass


class Unknown(Exception):
    """A row that cannot be described, with the reason."""


@dataclass(frozen=True)
class Family:
    """The models whose names begin in the same way."""

    pattern: str
    options: tuple[str, ...] = ()
    """Overrides of `model.*`; {seq_len} stands for the length of sequences."""
    tied: bool = False
    missing: str | None = None
    """What no recipe can describe; None: nothing."""


_GPT = ("model.norm=layer", "model.activation=gelu", "model.bias=all")
_LEARNED = ("model.positions=learned", "model.max_positions={seq_len}")
# ALiBi has no weights, and the kernels of these frameworks add it where they scale or multiply the scores anyway: it costs nothing.
FAMILIES = (
    Family(r"gpt[\s_-]?oss", missing="attention sinks and windows (GPT-OSS)"),
    Family(r"deepseek", missing="latent attention (DeepSeek)"),
    Family(r"kimi", missing="latent attention (Kimi)"),
    Family(r"gpt|mt-nlg|megatron|opt\b|opt-", (*_GPT, *_LEARNED), tied=True),
    Family(r"bloom", (*_GPT, "model.positions=none", "model.embedding_norm=true"), tied=True),
    Family(r"mpt", (*_GPT, *_LEARNED), tied=True),
    Family(r"llama[-_ ]?3\.2[-_ ]?[13]b", ("model.rope_theta=500000",), tied=True),
    Family(r"llama[-_ ]?4", missing="chunked attention and interleaved mixtures (Llama 4)"),
    Family(r"llama[-_ ]?3", ("model.rope_theta=500000",)),
    Family(r"llama"),
    Family(r"mixtral", ("model.rope_theta=1000000",)),
    Family(r"qwen3[-_ ]?next", missing="linear attention (Qwen3-Next)"),
    Family(r"qwen3", ("model.rope_theta=1000000", "model.qk_norm=true", "model.head_dim=128")),
    Family(r"qwen2.*(moe|a\d+(\.\d+)?b)", missing="a shared expert with a gate (Qwen2-MoE)"),
    Family(r"qwen2", ("model.rope_theta=1000000", "model.bias=attention")),
    Family(r"nemotron", missing="the squared ReLU (Nemotron)"),
    Family(r"gemma", missing="windows of attention and norms after blocks (Gemma)"),
    Family(r"palm", missing="attention and feed-forward side by side (PaLM)"),
)
"""The first pattern that begins a name counts. Where a family is missing from the list, its rows are left out."""


def family_of(model: str) -> Family:
    """Returns the family of a model. Raises Unknown if it has none, or one that no recipe can describe."""
    for family in FAMILIES:
        if re.match(family.pattern, model.strip().lower()):
            if family.missing:
                raise Unknown(f"the model cannot be described: {family.missing}")
            return family
    raise Unknown(f"the architecture of {model or 'a model without a name'} is not known")


@dataclass(frozen=True)
class Framework:
    """What the software of a run does by default, as its documentation says."""

    pattern: str
    attention: str
    """fused: one kernel that keeps no scores (flash attention, arXiv 2205.14135, from 2022-05 on); unfused: two products, the
    softmax of their scores in one kernel, and dropout, as Megatron-LM did before it."""
    kernel: str = ""
    """The kernel of fused attention, if it is one of KERNELS."""
    overlap: str = ""
    """What it computes beside collectives (overlap.py): "" what the trainer does. "blocking": nothing, as Megatron-LM before
    --async-tensor-model-parallel-allreduce (end of 2021) and --overlap-grad-reduce (2023), and DeepSpeed, whose overlap_comm is by
    default false but at stage 3. "chunked": products in chunks, as with tp_comm_overlap, which NVIDIA's performance recipes set."""
    sequence: bool = False
    """Whether activations between the tensor-parallel parts are split over the sequence where a row does not say so."""
    pads_vocabulary: int = 1
    """The vocabulary is padded to a multiple of this times the tensor degree, and the loss is computed over all of it."""


KERNELS: dict[str, dict[str, float]] = {
    "flash 2": {"H100": 1.45},
    "triton": {"A100": 1.8, "H100": 1.8 * 1.45},
}
"""How much longer a kernel takes than the best for a chip, where that is known. FlashAttention-2 is 1.3 to 2.5 times as fast as
FlashAttention in Triton (arXiv 2307.08691, section 4.1). It does without the instructions that came with the H100, and reaches 0.35
of its peak, where kernels with them reach 0.5 and more (arXiv 2407.08608, abstract and section 4.1)."""

FRAMEWORKS = (
    Framework(r"megatron-deepspeed|megatron-lm 20(19|20|21)|deepspeed", "unfused", overlap="blocking", pads_vocabulary=128),
    Framework(r"megatron-lm 2022", "unfused", pads_vocabulary=128),
    Framework(r"megatron-bridge|nemo", "fused", overlap="chunked", sequence=True, pads_vocabulary=128),
    Framework(r"megatron-core|megatron-lm|primus", "fused", sequence=True, pads_vocabulary=128),
    Framework(r"composer", "fused", "triton"),
    Framework(r"torchtitan|fsdp", "fused", "flash 2"),
    Framework(r"maxtext", "fused"),
)
"""Composer: `attn_impl: triton` in llm-foundry's configurations of 2023. torchtitan: PyTorch's flash attention, version 2."""


def framework_of(name: str) -> Framework:
    """Returns what is known of a framework. Raises Unknown for one that is not in the list."""
    for framework in FRAMEWORKS:
        if re.match(framework.pattern, name.strip().lower()):
            return framework
    raise Unknown(f"the framework {name or '(not given)'} is not known")

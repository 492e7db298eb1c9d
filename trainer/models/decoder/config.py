"""The model as a recipe describes it."""

from dataclasses import asdict, dataclass, field, fields, replace
from math import lcm, log
from typing import Any

from bagualu.comm.checks import RANGES, refuse_unused, require_at_least, require_at_most, require_representable
from bagualu.comm.errors import RecipeError
from bagualu.trainer.models.decoder.lora import LoraConfig

LARGEST = 2**24
"""The largest width, vocabulary or number of experts that is accepted. A larger value is a typing error that would otherwise show
only when memory is full."""
MOST_LAYERS = 2**14
LONGEST_ALIBI = 2**16
"""The most positions that `operators.alibi` tells apart."""
CHOICES = {"norm": ("rms", "layer"), "activation": ("swiglu", "gelu"),
           "positions": ("rotary", "learned", "alibi", "none"), "bias": ("none", "attention", "all"),
          "norm_position": ("before", "after"), "qk_norm_over": ("head", "all"),
           "rope_scaling": ("none", "linear", "llama3", "yarn"), "rope_scaled_layers": ("all", "full")}  # fmt: skip
"""The values of the keys of `model.*` that are names."""
_SCALING = {
    "linear": ("rope_factor",),
    "llama3": ("rope_factor", "rope_original_positions", "rope_low_frequency_factor", "rope_high_frequency_factor"),
    "yarn": ("rope_factor", "rope_original_positions", "rope_beta_slow", "rope_beta_fast", "rope_attention_factor"),
}
"""The keys that take effect with each model.rope_scaling, besides rope_scaled_layers."""
_ROPE = tuple(dict.fromkeys(key for keys in _SCALING.values() for key in keys))
_RAREST = 10.0
"""No initial weight is further from 0 than this many standard deviations."""


@dataclass
class MoEConfig:
    """`model.moe.*`: a mixture of experts in place of the feed-forward of every `every`-th layer."""

    experts: int = 0
    """Experts of each mixture layer, besides shared experts; 0: a dense model."""
    top_k: int = 2
    """The number of experts that process each token. Routing is dropless: every token reaches all of its experts."""
    ffn: int = 704
    """Hidden width of each expert's feed-forward."""
    shared_experts: int = 0
    """The number of experts that every token passes, each as wide as a routed expert."""
    every: int = 1
    """Layer i (from 0) is a mixture when (i + 1) is divisible by this."""
    router: str = "softmax"
    """How the router weights experts. softmax, the only choice: it gives each token probabilities over all experts, and the results
    of the top k are weighted by these probabilities."""
    renormalise: bool | None = None
    """Whether to divide the probabilities of the top k by their sum, so that the weights of a token sum to 1. Left out: true for
    top_k of 2 or more, false for 1, whose probability divided by itself is always 1, so that the router would learn nothing from
    the loss."""
    bias_rate: float | None = None
    """Balance the load by a bias for each expert, which is added to its probability when the top k are chosen, but not to its
    weight. After every applied step the bias of an expert rises by bias_rate if the expert got fewer tokens than the mean, and
    falls by bias_rate if it got more. 0 keeps the biases as they are; left out, there are no biases."""
    balance_loss: float = 0.01
    """Weight of the load-balancing loss in the objective. That loss is computed per sequence, averaged over the sequences of the
    global batch and summed over layers."""

    @property
    def has_bias(self) -> bool:
        return self.bias_rate is not None

    @property
    def renormalises(self) -> bool:
        return self.top_k > 1 if self.renormalise is None else self.renormalise


@dataclass
class ModelConfig:
    """`model.*`: a decoder; by default in the style of Llama (RMSNorm, rotary positions, SwiGLU, grouped-query attention)."""

    layers: int = 4
    hidden: int = 256
    heads: int = 4
    kv_heads: int | None = None
    """The number of key and value heads; left out, as many as model.heads."""
    ffn: int = 688
    vocab: int = 4096
    vocab_multiple: int = 1
    """Rows of the embedding and of the head are padded up to a multiple of this, and of parallel.tensor. Rows of padding are zero,
    take no part in the softmax and are in no checkpoint, so a run may resume with another multiple."""
    tie_embeddings: bool = False
    head_dim: int | None = field(default=None, metadata={"example": "128"})
    """The width of a head; left out, model.hidden / model.heads."""
    qk_norm: bool = False
    """Whether query and key are normalised before attention by an RMSNorm; `qk_norm_over` says over what."""
    qk_norm_over: str = "head"
    """head: over the width of each head, with a weight that all heads share, as in Qwen3 (arXiv 2505.09388) | all: over all heads
    together, with a weight for each element, as in OLMo 2 (arXiv 2501.00656)."""
    positions: str = "rotary"
    """How attention knows the order of tokens: rotary (rotated queries and keys) | learned (a vector for each position, added to
    the embedding) | alibi (a bias that falls with the distance, arXiv 2108.12409) | none (by causality alone)."""
    max_positions: int | None = field(default=None, metadata={"example": "2048"})
    """learned only: the number of vectors, at least data.sequence_length."""
    rope_theta: float = 10000.0
    rope_scaling: str = "none"
    """How the angles of rotary positions are changed for sequences longer than those of an earlier training: none | linear (all
    rotations become slower by rope_factor, arXiv 2306.15595) | llama3 (slow rotations do, as in Llama 3.1, arXiv 2407.21783) | yarn
    (slow rotations do, and attention becomes sharper, arXiv 2309.00071)."""
    rope_scaled_layers: str = "all"
    """With model.rope_scaling and model.window, the layers whose rotations are changed: all | full (those without a window, as in
    OLMo 3)."""
    rope_factor: float = 8.0
    """With model.rope_scaling: the factor by which rotations are slowed down."""
    rope_low_frequency_factor: float = 1.0
    """llama3 only: rotations that turn less often than this within rope_original_positions are slowed down by the whole factor."""
    rope_high_frequency_factor: float = 4.0
    """llama3 only: rotations that turn more often than this within rope_original_positions stay as they are; those between the two
    are slowed down in part."""
    rope_original_positions: int = 8192
    """llama3 and yarn only: the length of the sequences of the earlier training."""
    rope_beta_slow: float = 1.0
    """yarn only: rotations that turn less often than this within rope_original_positions are slowed down by the whole factor."""
    rope_beta_fast: float = 32.0
    """yarn only: rotations that turn more often than this within rope_original_positions stay as they are; those between the two
    are slowed down in part."""
    rope_attention_factor: float | None = field(default=None, metadata={"example": "1.2"})
    """yarn only: the factor by which rotated queries and keys are multiplied; left out, 0.1 ln(rope_factor) + 1."""
    window: int | None = field(default=None, metadata={"example": "4096"})
    """The number of latest tokens, its own included, that each token attends to (arXiv 2310.06825, section 2); left out, all."""
    full_attention_every: int | None = field(default=None, metadata={"example": "4"})
    """With model.window, layer i (from 0) attends to all tokens nevertheless when (i + 1) is divisible by this; left out, none
    does."""
    activation: str = "swiglu"
    """The feed-forward, also that of experts: swiglu (with a gate) | gelu (without a gate, GELU in its tanh form)."""
    bias: str = "none"
    """Which linear layers have a bias: none | attention (query, key and value, as in Qwen2) | all (of attention and feed-forward,
    as in GPT-2 and BLOOM; never routers, experts and the head)."""
    norm: str = "rms"
    """How hidden states are normalised: rms (RMSNorm, with a weight) | layer (LayerNorm, with a weight and a bias)."""
    norm_position: str = "before"
    """Where a layer's norms are: before (each normalises the input of attention or feed-forward) | after (their output, before it
    is added to the hidden states, as in OLMo 2, arXiv 2501.00656)."""
    embedding_norm: bool = False
    """Whether the embedding is normalised before the first layer, as in BLOOM (arXiv 2211.05100)."""
    norm_epsilon: float = 1e-5
    initial_std: float = 0.02
    moe: MoEConfig = field(default_factory=MoEConfig)
    lora: LoraConfig = field(default_factory=LoraConfig)
    origin: str | None = field(default=None, metadata={"key": "from", "path": True})
    """`model.from`: where the weights come from with which the run begins: a directory of Hugging Face, a run or a checkpoint. The
    other keys of the model then come from there too. Left out: weights are drawn from run.seed."""

    @property
    def key_value_heads(self) -> int:
        return self.heads if self.kv_heads is None else self.kv_heads

    @property
    def head_width(self) -> int:
        return self.hidden // self.heads if self.head_dim is None else self.head_dim

    @property
    def rope_amplitude(self) -> float:
        """The factor by which rotated queries and keys are multiplied."""
        if self.rope_attention_factor is not None:
            return self.rope_attention_factor
        return 0.1 * log(self.rope_factor) + 1 if self.rope_scaling == "yarn" else 1.0  # arXiv 2309.00071, section 3.4

    @property
    def gated(self) -> bool:
        """Whether a feed-forward has a gate, a third matrix."""
        return self.activation == "swiglu"

    @property
    def padded_vocab(self) -> int:
        return -(-self.vocab // self.vocab_multiple) * self.vocab_multiple

    def padded_over(self, ranks: int) -> "ModelConfig":
        """Returns the same model with the rows of its vocabulary padded to a multiple of `ranks` too."""
        return replace(self, vocab_multiple=lcm(self.vocab_multiple, ranks))

    def identity(self) -> dict[str, Any]:
        """Returns the values of `model.*`, by recipe key, that must be equal for a checkpoint to fit the model: all keys except
        model.vocab_multiple and model.from. Those of `renormalise`, `head_dim` and `rope_attention_factor` are the same whether
        they were given or left out."""
        others = "moe", "lora", "vocab_multiple", "origin"
        own = {f"model.{key}": value for key, value in asdict(self).items() if key not in others}
        own["model.head_dim"] = None if self.heads * self.head_width == self.hidden else self.head_width
        if self.rope_amplitude == replace(self, rope_attention_factor=None).rope_amplitude:
            own["model.rope_attention_factor"] = None
        moe = asdict(self.moe) | {"renormalise": self.moe.renormalises}
        own |= {f"model.lora.{key}": value for key, value in self.lora.identity().items()}
        return own | {f"model.moe.{key}": value for key, value in moe.items()}

    @staticmethod
    def fits(key: str, saved: Any, here: Any) -> bool:
        """Returns whether a checkpoint with the value `saved` of `key` in its identity fits a model with the value `here`. The rate
        of biases may change; only whether there are biases belongs to the model."""
        return (saved is None) == (here is None) if key == "model.moe.bias_rate" else bool(saved == here)

    def window_of(self, layer: int) -> int | None:
        """Returns how many tokens, its own included, a token attends to in `layer` (from 0); None for all."""
        every = self.full_attention_every
        return None if every and (layer + 1) % every == 0 else self.window

    def scales_rotations(self, layer: int) -> bool:
        """Returns whether the rotations of `layer` (from 0) are changed as `rope_scaling` says."""
        return self.rope_scaling != "none" and (self.rope_scaled_layers == "all" or self.window_of(layer) is None)

    def is_moe_layer(self, layer: int) -> bool:
        return self.moe.experts > 0 and (layer + 1) % self.moe.every == 0

    def validate(self, dtype: str = "float32") -> None:
        """Raises RecipeError for values that are wrong on every layout, and for numbers that weights of `dtype` cannot hold."""
        require_at_least(1, "model", self, "layers", "hidden", "heads", "ffn", "vocab", "vocab_multiple")
        require_at_most(MOST_LAYERS, "model", self, "layers")
        require_at_most(LARGEST, "model", self, "hidden", "heads", "ffn", "vocab", "vocab_multiple")
        require_at_least(0, "model.moe", self.moe, "experts")
        require_at_most(LARGEST, "model.moe", self.moe, "experts", "ffn")
        for name, choices in CHOICES.items():
            if getattr(self, name) not in choices:
                raise RecipeError(f"model.{name}={getattr(self, name)} is unknown; give one of {', '.join(choices)}")
        for name in ("rope_theta", "norm_epsilon", "initial_std"):
            if getattr(self, name) <= 0:
                raise RecipeError(
                    f"model.{name}={getattr(self, name)} must be positive, e.g. model.{name}={getattr(ModelConfig, name)}"
                )
        require_representable("model", self, "float64" if dtype == "float64" else "float32", "norm_epsilon", "rope_theta")
        self._validate_window()
        require_representable("model", self, dtype, "initial_std")
        if self.initial_std > RANGES[dtype][1] / _RAREST:
            raise RecipeError(f"model.initial_std={self.initial_std} makes initial weights that {dtype} cannot hold; "
                              f"give model.initial_std={ModelConfig.initial_std}")  # fmt: skip
        self._validate_heads()
        self._validate_positions()
        self.lora.validate()
        if self.moe.experts:
            self._validate_moe(dtype)
        else:
            others = [key.name for key in fields(MoEConfig) if key.name != "experts"]
            refuse_unused("model.moe", self.moe, others, "model.moe.experts=0")

    def _validate_heads(self) -> None:
        require_at_least(1, "model", self, "head_dim")
        require_at_most(LARGEST, "model", self, "head_dim")
        if self.head_dim is None and self.hidden % self.heads:
            more = -(-self.hidden // (2 * self.heads)) * 2 * self.heads
            raise RecipeError(f"model.hidden={self.hidden} is not divisible by model.heads={self.heads}; give model.hidden={more} "
                              "or model.head_dim")  # fmt: skip
        if self.positions == "rotary" and self.head_width % 2:
            given, fix = f"model.head_dim={self.head_dim}", f"model.head_dim={self.head_width + 1}"
            if self.head_dim is None:
                given = f"model.hidden={self.hidden} / model.heads={self.heads} = {self.head_width}"
                fix = f"model.hidden={(self.head_width + 1) * self.heads}"
            raise RecipeError(f"{given} must be even for rotary positions; give {fix}")
        if self.key_value_heads < 1 or self.heads % self.key_value_heads:
            fits = [n for n in range(1, self.heads + 1) if self.heads % n == 0]
            raise RecipeError(f"model.kv_heads={self.kv_heads} must divide model.heads={self.heads}; give one of {fits}")
        if not self.qk_norm:
            refuse_unused("model", self, ["qk_norm_over"], "model.qk_norm=false")

    def _validate_window(self) -> None:
        require_at_least(1, "model", self, "window", "full_attention_every")
        if self.window is None:
            refuse_unused("model", self, ["full_attention_every"], "model.window=null")
        elif self.full_attention_every == 1:
            raise RecipeError(f"model.full_attention_every=1 leaves no layer with model.window={self.window}; leave model.window "
                              "out or give model.full_attention_every=2 or more")  # fmt: skip

    def _validate_scaling(self) -> None:
        taking_effect = _SCALING.get(self.rope_scaling, ())
        refuse_unused("model", self, [key for key in _ROPE if key not in taking_effect], f"model.rope_scaling={self.rope_scaling}")
        require_at_least(1, "model", self, "rope_factor", "rope_original_positions")
        for slow, fast in (("rope_low_frequency_factor", "rope_high_frequency_factor"), ("rope_beta_slow", "rope_beta_fast")):
            low, high = getattr(self, slow), getattr(self, fast)
            if not 0 < low < high:
                raise RecipeError(f"model.{slow}={low} must be above 0 and below model.{fast}={high}; give e.g. "
                                  f"model.{slow}={abs(high) / 4}")  # fmt: skip
        if self.rope_scaling == "yarn" and self.rope_theta <= 1:
            raise RecipeError(f"model.rope_theta={self.rope_theta} must be above 1 for model.rope_scaling=yarn; give e.g. "
                              f"model.rope_theta={ModelConfig.rope_theta}")  # fmt: skip
        if self.rope_attention_factor is not None and self.rope_attention_factor <= 0:
            raise RecipeError(f"model.rope_attention_factor={self.rope_attention_factor} must be positive, or leave it out")
        if self.rope_scaling == "none" or self.window is None:
            without = "rope_scaling=none" if self.rope_scaling == "none" else "window=null"
            refuse_unused("model", self, ["rope_scaled_layers"], f"model.{without}")
        elif self.rope_scaled_layers == "full" and self.full_attention_every is None:
            raise RecipeError("model.rope_scaled_layers=full scales no layer, because all layers have the window; give "
                              "model.rope_scaled_layers=all, or model.full_attention_every")  # fmt: skip

    def _validate_positions(self) -> None:
        if self.positions == "rotary":
            self._validate_scaling()
        else:
            ineffective = ["rope_theta", "rope_scaling", "rope_scaled_layers", *_ROPE]
            refuse_unused("model", self, ineffective, f"model.positions={self.positions}")
        if self.positions != "learned":
            refuse_unused("model", self, ["max_positions"], f"model.positions={self.positions}")
        elif self.max_positions is None:
            raise RecipeError("model.positions=learned needs the number of positions, at least data.sequence_length; give e.g. "
                              "model.max_positions=2048")  # fmt: skip
        require_at_least(1, "model", self, "max_positions")
        require_at_most(LARGEST, "model", self, "max_positions")

    def _validate_moe(self, dtype: str) -> None:
        moe = self.moe
        require_at_least(1, "model.moe", moe, "ffn", "every")
        require_at_least(0, "model.moe", moe, "shared_experts", "balance_loss")
        if moe.has_bias:
            require_at_least(0, "model.moe", moe, "bias_rate")
            require_at_most(1, "model.moe", moe, "bias_rate")
            require_representable("model.moe", moe, "float64" if dtype == "float64" else "float32", "bias_rate")
            if moe.top_k == moe.experts:
                refuse_unused("model.moe", moe, ["bias_rate"], f"model.moe.top_k={moe.top_k}, which chooses all experts")
        if not 1 <= moe.top_k <= moe.experts:
            raise RecipeError(f"model.moe.top_k={moe.top_k} must lie between 1 and model.moe.experts={moe.experts}; "
                              f"give model.moe.top_k={min(max(moe.top_k, 1), moe.experts)}")  # fmt: skip
        if moe.top_k == 1 and moe.renormalise:
            raise RecipeError("model.moe.renormalise=true with model.moe.top_k=1 divides the probability of the one expert by "
                              "itself, so that the router learns nothing from the loss; give model.moe.renormalise=false or "
                              "model.moe.top_k=2")  # fmt: skip
        if moe.every > self.layers:
            raise RecipeError(f"model.moe.every={moe.every} leaves no mixture in {self.layers} layers; "
                              f"give at most {self.layers}, or model.moe.experts=0 for a dense model")  # fmt: skip
        if moe.router != "softmax":
            raise RecipeError(f"model.moe.router={moe.router} is unknown; give model.moe.router=softmax")

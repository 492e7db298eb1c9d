"""The decoder once more, as naively as it can be written: plain torch operations, one head, one token, one expert at a time.

It shares no code with the decoder but the names of its parameters, and takes nothing from `bagualu` but the configuration.
"""

import math

import torch
import torch.nn.functional as F

from bagualu.trainer.models.decoder.config import ModelConfig

Weights = dict[str, torch.Tensor]


def losses(config: ModelConfig, weights: Weights, inputs: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean cross-entropy over the labels that are not -100, and the balance loss summed over sequences and layers."""
    x = weights["embedding.weight"][inputs]
    if config.positions == "learned":
        x = x + torch.stack([weights["embedding.positions.weight"][position] for position in range(inputs.shape[1])])
    if config.embedding_norm:
        x = normed(config, weights, "embedding_norm", x)
    balance = x.new_zeros(())
    for layer in range(config.layers):
        own = {name.removeprefix(f"layers.{layer}."): w for name, w in weights.items() if name.startswith(f"layers.{layer}.")}
        rows = x if config.norm_position == "after" else normed(config, own, "attention_norm", x)
        added = torch.stack([attention(config, own, row, layer) for row in rows])
        x = x + (normed(config, own, "attention_norm", added) if config.norm_position == "after" else added)
        rows = x if config.norm_position == "after" else normed(config, own, "feed_forward_norm", x)
        if "feed_forward.router.weight" in own:
            mixed = [mixture(config, own, row) for row in rows]
            added = torch.stack([output for output, _ in mixed])
            balance = balance + torch.stack([loss for _, loss in mixed]).sum()
        else:
            added = feed_forward(config, parts_of(own, "feed_forward."), rows)
        x = x + (normed(config, own, "feed_forward_norm", added) if config.norm_position == "after" else added)
    x = normed(config, weights, "norm", x)
    head = weights["embedding.weight"] if config.tie_embeddings else weights["head.weight"]
    logits = x @ head[: config.vocab].T
    return F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=-100), balance


def normed(config: ModelConfig, own: Weights, name: str, x: torch.Tensor) -> torch.Tensor:
    weight, bias = own[f"{name}.weight"], own.get(f"{name}.bias")
    if config.norm == "layer":
        centred = x - x.mean(-1, keepdim=True)
        return centred / ((centred * centred).mean(-1, keepdim=True) + config.norm_epsilon).sqrt() * weight + bias
    return x / ((x * x).mean(-1, keepdim=True) + config.norm_epsilon).sqrt() * weight


def attention(config: ModelConfig, own: Weights, x: torch.Tensor, layer: int) -> torch.Tensor:
    """x [S, H], one sequence; head by head, softmax of masked scores written out."""
    width, shared = config.head_width, config.heads // config.key_value_heads
    outputs = []
    for head in range(config.heads):
        own_rows = slice(head * width, (head + 1) * width)
        key_rows = slice(head // shared * width, (head // shared + 1) * width)
        query = turned(config, of_head(config, own, "query", x, own_rows), layer)
        key = turned(config, of_head(config, own, "key", x, key_rows), layer)
        value = linear(own, "attention.value", x, key_rows)
        scores = query @ key.T / math.sqrt(width)
        if config.positions == "alibi":
            scores = scores + slope(config.heads, head) * torch.tensor([[k - q for k in range(len(x))] for q in range(len(x))])
        scores = scores.masked_fill(torch.ones_like(scores).triu(1).bool(), -torch.inf)
        if not sees_all(config, layer):
            far = [[q - k >= config.window for k in range(len(x))] for q in range(len(x))]
            scores = scores.masked_fill(torch.tensor(far), -torch.inf)
        weights = scores.exp() / scores.exp().sum(-1, keepdim=True)
        outputs.append(weights @ value)
    return linear(own, "attention.output", torch.cat(outputs, -1))


def parts_of(own: Weights, prefix: str) -> Weights:
    return {name.removeprefix(prefix): weight for name, weight in own.items() if name.startswith(prefix)}


def linear(own: Weights, name: str, x: torch.Tensor, rows: slice = slice(None)) -> torch.Tensor:
    """x times the `rows` of a weight, plus those of its bias if it has one"""
    bias = own.get(f"{name}.bias")
    product = x @ own[f"{name}.weight"][rows].T
    return product if bias is None else product + bias[rows]


def of_head(config: ModelConfig, own: Weights, part: str, x: torch.Tensor, rows: slice) -> torch.Tensor:
    """x [S, H] -> query or key of a head [S, D]"""
    projected = linear(own, f"attention.{part}", x, rows)
    if config.qk_norm and config.qk_norm_over == "all":
        whole = linear(own, f"attention.{part}", x)
        length = ((whole * whole).mean(-1, keepdim=True) + config.norm_epsilon).sqrt()
        projected = projected / length * own[f"attention.{part}_norm.weight"][rows]
    elif config.qk_norm:
        length = ((projected * projected).mean(-1, keepdim=True) + config.norm_epsilon).sqrt()
        projected = projected / length * own[f"attention.{part}_norm.weight"]
    return projected


def unfelt(config: ModelConfig) -> bool:
    """Whether a bias of keys, the same for all positions, changes all scores of a query alike, so that softmax takes it out."""
    return config.positions != "rotary" and not config.qk_norm


def slope(heads: int, head: int) -> float:
    """Returns the slope of a head (`head` counts from 0), by the rule in the code of the paper's authors."""
    below = 2 ** math.floor(math.log2(heads))
    if head < below:
        return 2 ** (-8 / below * (head + 1))
    return [2 ** (-8 / (2 * below) * (other + 1)) for other in range(0, 2 * below, 2)][head - below]


def turned(config: ModelConfig, x: torch.Tensor, layer: int) -> torch.Tensor:
    """x [S, D]; with rotary positions, the pair (i, i + D / 2) as one complex number, turned by position * theta^(-2i / D).
    Yarn also makes it longer."""
    if config.positions != "rotary":
        return x
    half = config.head_width // 2
    pairs = torch.complex(x[:, :half].contiguous(), x[:, half:].contiguous())
    speeds = torch.tensor([speed(config, i, layer) for i in range(half)], dtype=torch.float64)
    angles = torch.stack([position * speeds for position in range(len(x))])
    stretched = config.rope_scaling == "yarn" and scales(config, layer)
    length = (config.rope_attention_factor or 0.1 * math.log(config.rope_factor) + 1) if stretched else 1.0
    pairs = pairs * torch.polar(torch.full_like(angles, length), angles)
    return torch.cat([pairs.real, pairs.imag], -1)


def sees_all(config: ModelConfig, layer: int) -> bool:
    """Whether tokens of a layer attend to all tokens before them."""
    everywhere = config.full_attention_every and (layer + 1) % config.full_attention_every == 0
    return not config.window or bool(everywhere)


def scales(config: ModelConfig, layer: int) -> bool:
    """Whether the speeds of a layer are scaled."""
    return config.rope_scaling != "none" and (config.rope_scaled_layers == "all" or sees_all(config, layer))


def speed(config: ModelConfig, pair: int, layer: int) -> float:
    """Returns the angle by which pair `pair` is turned from one position to the next. llama3 as published by Meta; yarn by equation
    (13) of arXiv 2309.00071, with a ramp between the pairs that turn beta_fast and beta_slow times, whose numbers are rounded away
    from each other."""
    plain = config.rope_theta ** (-2 * pair / config.head_width)
    if not scales(config, layer):
        return plain
    if config.rope_scaling == "linear":
        return plain / config.rope_factor
    if config.rope_scaling == "yarn":
        turning = [math.log(config.rope_original_positions / (2 * math.pi * turns), config.rope_theta) * config.head_width / 2
                   for turns in (config.rope_beta_fast, config.rope_beta_slow)]  # fmt: skip
        first, last = max(0, math.floor(turning[0])), math.ceil(turning[1])
        share = min(1, max(0, (pair - first) / (last - first)))
        return (1 - share) * plain + share * plain / config.rope_factor
    original, low, high = config.rope_original_positions, config.rope_low_frequency_factor, config.rope_high_frequency_factor
    wavelength = 2 * math.pi / plain
    if wavelength < original / high:
        return plain
    if wavelength > original / low:
        return plain / config.rope_factor
    smooth = (original / wavelength - low) / (high - low)
    return (1 - smooth) * plain / config.rope_factor + smooth * plain


def feed_forward(config: ModelConfig, parts: Weights, x: torch.Tensor) -> torch.Tensor:
    """`parts`: weights, and biases if any, of gate, up and down; no gate for gelu."""
    assert ("gate.weight" in parts) == (config.activation == "swiglu")
    inner = linear(parts, "up", x)
    if config.activation == "gelu":
        activated = 0.5 * inner * (1 + torch.tanh(math.sqrt(2 / math.pi) * (inner + 0.044715 * inner**3)))
    else:
        gated = linear(parts, "gate", x)
        activated = gated * torch.sigmoid(gated) * inner
    return linear(parts, "down", activated)


def mixture(config: ModelConfig, own: Weights, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """x [S, H], one sequence, token by token; its balance loss by counting."""
    moe = config.moe
    outputs, all_probabilities, counts = [], [], [0] * moe.experts
    for token in x:
        scores = own["feed_forward.router.weight"] @ token
        probabilities = scores.exp() / scores.exp().sum()
        best = sorted(range(moe.experts), key=lambda e: -probabilities[e].item())[: moe.top_k]
        total = sum(probabilities[e] for e in best) if moe.top_k > 1 else 1.0
        output = torch.zeros_like(token)
        for e in best:
            expert = {f"{part}.weight": weight[e] for part, weight in parts_of(own, "feed_forward.experts.").items()}
            output = output + probabilities[e] / total * feed_forward(config, expert, token)
            counts[e] += 1
        if moe.shared_experts:
            output = output + feed_forward(config, parts_of(own, "feed_forward.shared."), token)
        outputs.append(output)
        all_probabilities.append(probabilities)
    mean = torch.stack(all_probabilities).mean(0)
    balance = sum(counts[e] * mean[e] for e in range(moe.experts)) * moe.experts / (moe.top_k * len(x))
    return torch.stack(outputs), balance

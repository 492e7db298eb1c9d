"""Where the files of Hugging Face hold the decoder's parameters: names and layouts, in both directions."""

from collections.abc import Iterator
from dataclasses import dataclass

from bagualu.parallel.boxes import Box
from bagualu.trainer.models.decoder.config import ModelConfig
from bagualu.trainer.models.decoder.shapes import parameter_shapes
from bagualu.trainer.models.hugging_face.families import ModelFamily

Shape = tuple[int, ...]


@dataclass(frozen=True)
class FilePart:
    """A box of a parameter of the decoder, and the box of a tensor in the files that holds its values in the same row-major
    order."""

    parameter: str
    box: Box
    """In the parameter."""
    tensor: str
    shape: Shape
    """The shape of the whole tensor in the files."""
    offset: Shape
    """Where the part begins in the tensor."""

    def within(self, wanted: Box) -> "tuple[Box, Box] | None":
        """Returns the elements that `wanted`, a box of the parameter, shares with this part: as a box of the parameter, and as one
        of the tensor; None if there are none. A tensor of one expert lacks the first dim of the parameter."""
        common = self.box.intersection(wanted)
        if common is None:
            return None
        dropped = len(self.box.shape) - len(self.shape)
        relative = common.shift(tuple(-o for o in self.box.offset))
        inner = Box(relative.offset[dropped:], relative.shape[dropped:])
        return common, inner.shift(self.offset)


EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
_OUTSIDE = {"embedding.weight": EMBEDDING, "norm.weight": "model.norm.weight", "head.weight": HEAD}
_BEFORE = {"attention_norm": "input_layernorm", "feed_forward_norm": "post_attention_layernorm"}
_AFTER = {"attention_norm": "post_attention_layernorm", "feed_forward_norm": "post_feedforward_layernorm"}
_INSIDE = {
    "attention.query": "self_attn.q_proj", "attention.key": "self_attn.k_proj", "attention.value": "self_attn.v_proj",
    "attention.output": "self_attn.o_proj", "attention.query_norm": "self_attn.q_norm", "attention.key_norm": "self_attn.k_norm",
    "feed_forward.gate": "mlp.gate_proj", "feed_forward.up": "mlp.up_proj", "feed_forward.down": "mlp.down_proj",
}  # fmt: skip
_MIXTRAL = {"gate": "w1", "up": "w3", "down": "w2"}


def parts_of(model: ModelConfig, family: ModelFamily, fused: bool = False) -> list[FilePart]:
    """Returns the parts of all parameters, in the order of the decoder. `fused`: whether the files hold the experts of a layer in
    two tensors, as transformers 5 has them in memory, rather than each matrix of each expert by itself."""
    return [part for name, shape in parameter_shapes(model).items() for part in _parts(model, family, name, shape, fused)]


def shapes_of(parts: list[FilePart]) -> dict[str, Shape]:
    """Returns the shapes of the tensors of the files, by name."""
    return {part.tensor: part.shape for part in parts}


def _parts(model: ModelConfig, family: ModelFamily, name: str, shape: Shape, fused: bool) -> Iterator[FilePart]:
    whole = Box((0,) * len(shape), shape)
    if name in _OUTSIDE:
        yield FilePart(name, whole, _OUTSIDE[name], shape, whole.offset)
        return
    _, layer, own = name.split(".", 2)
    prefix, matrix = f"model.layers.{layer}.", own.rpartition(".")[2]
    if own.startswith("feed_forward.experts."):
        yield from _fused(name, whole, prefix, matrix) if fused else _by_expert(family, name, shape, prefix, matrix)
        return
    block = "block_sparse_moe" if family.model_type == "mixtral" and not fused else "mlp"
    stem, kind = own.rpartition(".")[::2]
    norms = _AFTER if model.norm_position == "after" else _BEFORE
    there = {**_INSIDE, **norms, "feed_forward.router": f"{block}.gate"}[stem]
    yield FilePart(name, whole, f"{prefix}{there}.{kind}", shape, whole.offset)


def _by_expert(family: ModelFamily, name: str, shape: Shape, prefix: str, matrix: str) -> Iterator[FilePart]:
    mixtral = family.model_type == "mixtral"
    there = f"block_sparse_moe.experts.{{}}.{_MIXTRAL[matrix]}" if mixtral else f"mlp.experts.{{}}.{matrix}_proj"
    for expert in range(shape[0]):
        box = Box((expert, 0, 0), (1, *shape[1:]))
        yield FilePart(name, box, f"{prefix}{there.format(expert)}.weight", shape[1:], (0, 0))


def _fused(name: str, whole: Box, prefix: str, matrix: str) -> Iterator[FilePart]:
    experts, ffn, hidden = whole.shape
    if matrix == "down":
        yield FilePart(name, whole, f"{prefix}mlp.experts.down_proj", whole.shape, whole.offset)
    else:
        at = 0 if matrix == "gate" else ffn
        yield FilePart(name, whole, f"{prefix}mlp.experts.gate_up_proj", (experts, 2 * ffn, hidden), (0, at, 0))

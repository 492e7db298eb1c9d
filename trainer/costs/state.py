"""The bytes of the state that a rank keeps between steps, by kind, computed from shapes without padding."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod

from bagualu.parallel.layout import SHARD
from bagualu.parallel.memory_kinds import BUFFERS, COMMUNICATION, GRADIENTS, MASTERS, MOMENTS, PARAMETERS
from bagualu.parallel.pipeline.layer_slice import LayerPart
from bagualu.parallel.sharding import Placement
from bagualu.trainer.costs.work import ModelWork
from bagualu.trainer.models.decoder.shapes import embedding_shapes, layer_buffers, layer_shapes, norm_shapes, parameter_shapes

EMBEDDING = -1
"""The unit of the embedding. Layers have their own numbers, the last norm the number of layers, the head the next number."""
EMBEDDING_NORM = -2
"""The unit of the embedding's norm."""


def layer_state(work: ModelWork, index: int, part: LayerPart = LayerPart.WHOLE) -> Counter[str]:
    """Returns the bytes, by kind, that a rank holds of a decoder layer, or of a half of it; `buffers` include the angles of its
    positions, or its slopes."""
    state = Counter({BUFFERS: buffer_bytes(work, index, part)})
    for name, shape in layer_shapes(work.model, index, part).items():
        state += parameter_state(work, f"layers.{index}.{name}", shape)
    return state


def buffer_bytes(work: ModelWork, index: int, part: LayerPart = LayerPart.WHOLE) -> int:
    """Returns the bytes of the buffers of a decoder layer, or of a half of it, on a rank; attention has the angles of its
    positions, or its slopes."""
    elements = sum(prod(shape) for shape in layer_buffers(work.model, index, part).values())
    angles, slopes = 2 * work.sequence_length * work.model.head_width, work.model.heads // work.layout.tensor
    positions = {"rotary": angles, "alibi": slopes}.get(work.model.positions, 0) if part is not LayerPart.FEED_FORWARD else 0
    return (elements + positions) * work.accurate_bytes


def end_state(work: ModelWork) -> tuple[Counter[str], Counter[str]]:
    """Returns the bytes, by kind, of the embedding, and of the head with the final norm. If embeddings are tied, both include the
    weight that they share."""
    vocabulary = (work.model.padded_vocab, work.model.hidden)
    first, last = embedding_shapes(work.model, work.model.padded_vocab), norm_shapes(work.model, "norm")
    embedding, head = (
        sum((parameter_state(work, name, shape) for name, shape in shapes.items()), Counter[str]())
        for shapes in (first, {"head.weight": vocabulary, **last})
    )
    return embedding, head


def saved_bytes(work: ModelWork, index: int, part: LayerPart = LayerPart.WHOLE) -> int:
    """Returns the bytes of a decoder layer, or of a half of it, over all ranks, in a checkpoint: its master weights, moments and
    buffers."""
    shapes = {f"layers.{index}.{name}": shape for name, shape in layer_shapes(work.model, index, part).items()}
    moments = sum(prod(shape) * work.moment_bytes(name) for name, shape in shapes.items())
    buffers = sum(prod(shape) for shape in layer_buffers(work.model, index, part).values())
    weights = sum(map(prod, shapes.values()))
    return (weights + buffers) * work.accurate_bytes + moments


def checkpoint_bytes(work: ModelWork) -> int:
    """Returns the bytes of the tensors in a checkpoint, over all ranks."""
    ends = {name: shape for name, shape in parameter_shapes(work.model).items() if not name.startswith("layers.")}
    outside = sum(prod(shape) * (work.accurate_bytes + work.moment_bytes(name)) for name, shape in ends.items())
    return outside + sum(saved_bytes(work, index) for index in range(work.model.layers))


Layers = Mapping[int, LayerPart]
"""What a rank holds of each of its layers, in order."""


def ends_with(work: ModelWork, layers: Layers) -> tuple[bool, bool]:
    """Returns whether a rank that holds these layers also holds the embedding, and whether it holds the head."""
    first, last = layers.get(0), layers.get(work.model.layers - 1)
    return first not in (None, LayerPart.FEED_FORWARD), last not in (None, LayerPart.ATTENTION)


def rank_parameters(work: ModelWork, layers: Layers) -> list[tuple[str, tuple[int, ...], list[int]]]:
    """Returns (local name, global shape, units that read it) of the parameters of a rank that holds these layers, the embedding
    with the attention of layer 0 and the head with the feed-forward of the last layer, in the order of the model."""
    model, last = work.model, work.model.layers
    vocabulary, ends = (model.padded_vocab, model.hidden), ends_with(work, layers)
    one = model.tie_embeddings and all(ends)
    found: list[tuple[str, tuple[int, ...], list[int]]] = []
    if ends[0]:
        for name, shape in embedding_shapes(model, model.padded_vocab).items():
            found.append((name, shape, [EMBEDDING_NORM if name.startswith("embedding_norm") else EMBEDDING]))
        found[0][2].extend([last + 1] * one)
    held = ((i, layer_shapes(model, i, part)) for i, part in layers.items())
    found += [(f"layers.{i}.{name}", shape, [i]) for i, shapes in held for name, shape in shapes.items()]
    if ends[1]:
        found += [(name, shape, [last]) for name, shape in norm_shapes(model, "norm").items()]
    return found + ([("head.weight", vocabulary, [last + 1])] if ends[1] and not one else [])


@dataclass(frozen=True)
class StatePart:
    """What a rank would hold of a parameter, or of several that are alike, if ZeRO divided nothing."""

    name: str
    """The global name, of one of them if there are several."""
    elements: int
    ranks: int
    """The number of ranks among which ZeRO divides the elements."""
    over_two_axes: bool
    """Whether the gradient is summed over a second axis too, so that it is kept whole, except by FSDP2."""


def part_of(work: ModelWork, name: str, shape: tuple[int, ...]) -> StatePart:
    """Returns the part of the parameter that has this local name and this global shape."""
    key = shape, _without_number(name)
    if (known := work.known.get(key)) is None:
        placement, layout = placement_of(work, name), work.layout
        elements = prod(placement.box(name, shape, layout, layout.coordinates(0)).shape)
        tied = work.plan.global_name(name) in work.plan.tied.values() and work.ends_apart
        known = elements, layout.size(placement.reduction_axis + SHARD), tied or is_partial(work, placement)
        work.known[key] = known
    return StatePart(work.plan.global_name(name), *known)


def placement_of(work: ModelWork, name: str) -> Placement:
    """Returns where the plan puts the parameter that has this local name."""
    key = "placement", _without_number(name)
    if (known := work.known.get(key)) is None:
        known = work.known[key] = work.plan.placement(name)
    found: Placement = known
    return found


def _without_number(name: str) -> str:
    """Returns the name of a parameter without the number of its layer, on which its placement does not depend."""
    return name.split(".", 2)[2] if name.startswith("layers.") else name


def is_partial(work: ModelWork, placement: Placement) -> bool:
    """Returns whether each rank along a second axis computes only a part of the gradient."""
    return placement.partial_over is not None and work.layout.size(placement.partial_over) > 1


def parameter_state(work: ModelWork, name: str, shape: tuple[int, ...]) -> Counter[str]:
    """Returns the bytes, by kind, that a rank holds of the parameter that has this local name and this global shape."""
    return divided_state(work, part_of(work, name, shape))


def divided_state(work: ModelWork, part: StatePart) -> Counter[str]:
    """Returns the bytes, by kind, that a rank holds of `part`: working weights and, if it is trained, gradients, moments and master
    weights; these only for 16-bit working weights, except that DeepSpeed always has them. What DeepSpeed keeps in host memory,
    apart from that of the device, does not count."""
    key = part.elements, part.ranks, part.over_two_axes, part.name in work.frozen, work.moments.get(part.name)
    if (known := work.known.get(key)) is None:
        known = work.known[key] = _divided_state(work, part)
    return Counter(known)


def _divided_state(work: ModelWork, part: StatePart) -> Counter[str]:
    elements, item, wide, trained = part.elements, work.item_bytes, work.accurate_bytes, part.name not in work.frozen
    if work.engine == "fsdp" and part.ranks > 1:
        return _gathered_from_masters(work, part)
    share = [part.ranks if work.zero >= stage else 1 for stage in range(4)]
    state = Counter({PARAMETERS: elements * item // share[3]})
    if trained:
        state[GRADIENTS] = elements * wide // (1 if part.over_two_axes else share[2])
        state[MASTERS] = elements * wide // share[1] if item < wide or work.engine == "deepspeed" else 0
        state[MOMENTS] = elements * work.moment_bytes(part.name) // share[1]
    elsewhere = {"none": (), "optimizer": (GRADIENTS, MASTERS, MOMENTS), "parameters": (PARAMETERS, GRADIENTS, MASTERS, MOMENTS)}
    return Counter({kind: size for kind, size in state.items() if work.on_cpu or kind not in elsewhere[work.offload]})


def _gathered_from_masters(work: ModelWork, part: StatePart) -> Counter[str]:
    """Returns the bytes of a part that FSDP2 divides. It gathers working weights from what the optimizer updates, and a rank with
    several stages keeps those that it has gathered."""
    elements, wide, trained = part.elements, work.accurate_bytes, part.name not in work.frozen
    gathered = elements * work.item_bytes if work.stages > 1 else 0
    if not trained:
        return Counter({PARAMETERS: elements * work.item_bytes // part.ranks, COMMUNICATION: gathered})
    return Counter({
        MASTERS if work.item_bytes < wide else PARAMETERS: elements * wide // part.ranks,
        GRADIENTS: elements * wide // part.ranks,
        MOMENTS: elements * work.moment_bytes(part.name) // part.ranks,
        COMMUNICATION: gathered,
    })  # fmt: skip

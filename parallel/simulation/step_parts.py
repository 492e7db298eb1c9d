"""The parts of a training step, with the same names wherever a step is estimated or predicted, and what they mean."""

from collections.abc import Iterable

PRODUCTS, ATTENTION, OTHER_KERNELS = "matrix products", "attention", "other kernels"
IN_PIPELINE, FOR_OTHERS = "waiting in the pipeline", "waiting for ranks with more work"
FOR_STRAGGLERS = "waiting for stragglers"
_BETWEEN_STAGES, _OF_DATA, _OF_ENDS, _OF_ALL = (
    "messages between stages", "data communication", "sum for tied embeddings", "agreement of all ranks",
)  # fmt: skip
_OF_GROUPS = {"pipeline": _BETWEEN_STAGES, "fold": _OF_DATA, "replica": _OF_DATA, "ends": _OF_ENDS, "world": _OF_ALL}
"""The communication of groups that do not have the name of an axis of parallel.*, by the group's name without its tier."""
_MEANINGS = {
    PRODUCTS: "of linear layers, also those that train.recompute computes again",
    ATTENTION: "queries with keys and values, also what is computed again",
    OTHER_KERNELS: "norms, activation functions, copies and the update of weights",
    "tensor communication": "tensor ranks exchange their parts of each layer's activations",
    "expert communication": "tokens go to the ranks of their experts and back",
    _BETWEEN_STAGES: "activations and gradients between pipeline ranks",
    _OF_DATA: "data ranks sum gradients, and gather the weights that ZeRO divides",
    _OF_ENDS: "the first and the last stage sum the gradients of the weights that they share",
    _OF_ALL: "the norm of the gradients, the loss, and whether to go on",
    IN_PIPELINE: "the bubble: pipeline ranks wait for one another",
    FOR_OTHERS: "ranks with fewer micro-batches or tokens, or a faster chip, wait for the others",
    FOR_STRAGGLERS: "ranks wait for the slowest of those that do the same",
}


def communication(group: str) -> str:
    """Returns the name of the part of a step in which ranks wait for communication of `group`, named after its mesh axis."""
    return _OF_GROUPS.get(group.partition("_")[0], f"{group} communication")


def meaning(part: str) -> str:
    """Returns what happens in a part of a step; "" if its name says all."""
    return _MEANINGS.get(part, "")


def legend(parts: Iterable[str]) -> list[str]:
    """Returns a line for each of these parts that has a meaning, in the order in which they are listed here."""
    named = set(parts)
    shown = [part for part in _MEANINGS if part in named]
    width = max(map(len, shown), default=0)
    return [f"  {part:<{width}}  {_MEANINGS[part]}" for part in shown]

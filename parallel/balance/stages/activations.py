"""Reads train.recompute and train.offload_bytes: how a run keeps activations between forward and backward passes."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from bagualu.comm.errors import RecipeError

FORMS = "none, full, auto, attention, experts, every:N, [LAYER,...], bytes:N"
"""The values of train.recompute, for messages."""


@dataclass(frozen=True)
class Activations:
    """How a run keeps activations. The default keeps all of them in device memory."""

    recompute: tuple[str, ...] | None = ()
    """For each layer of the model, what its backward pass computes again: none, attention, experts or full. Empty: nothing in any
    layer. None: the layers that recompute in full are chosen, only as many as the limits of memory require."""
    most_bytes: int | None = None
    """The most bytes of activations that a rank may keep in device memory; None: no limit of their own."""
    offload_bytes: int = 0
    """The most bytes of activations that a rank keeps in host memory."""

    def of_layer(self, layer: int, chosen: frozenset[int] = frozenset()) -> str:
        """Returns what `layer` computes again, given the set of layers that were `chosen` to recompute in full."""
        if self.recompute is None:
            return "full" if layer in chosen else "none"
        return self.recompute[layer] if self.recompute else "none"


ALL_KEPT = Activations()


def read_activations(recompute: Any, offload_bytes: int, mixtures: Sequence[bool]) -> Activations:
    """Returns the meaning of train.recompute and train.offload_bytes for a model with a layer for each item of `mixtures`, which
    says whether the layer is a mixture of experts. Raises RecipeError for a value that has no meaning."""
    if offload_bytes < 0:
        raise RecipeError(f"train.offload_bytes={offload_bytes} must be at least 0; give the bytes of host memory that each rank "
                          "may use, e.g. train.offload_bytes=1073741824, or leave it out")  # fmt: skip
    most_bytes = _number(recompute, "bytes:", "bytes:1073741824")
    chosen = recompute == "auto" or most_bytes is not None
    return Activations(None if chosen else _by_layer(recompute, mixtures), most_bytes, offload_bytes)


def _by_layer(recompute: Any, mixtures: Sequence[bool]) -> tuple[str, ...]:
    layers = range(len(mixtures))
    if recompute == "experts" and not any(mixtures):
        raise RecipeError("train.recompute=experts needs a mixture of experts; give train.recompute=attention or full, or "
                          "model.moe.experts")  # fmt: skip
    if recompute in ("none", "full", "attention"):
        return (str(recompute),) * len(layers)
    if recompute == "experts":
        return tuple("experts" if mixture else "none" for mixture in mixtures)
    if isinstance(recompute, Sequence) and not isinstance(recompute, str):
        full = _listed(list(recompute), mixtures)
    elif (step := _number(recompute, "every:", "every:2")) is not None:
        full = set(layers[::step])
    else:
        typed = "null" if recompute is None else str(recompute).lower() if isinstance(recompute, bool) else recompute
        raise RecipeError(f"train.recompute={typed} is unknown; give one of {FORMS}")
    return tuple("full" if layer in full else "none" for layer in layers)


def _listed(numbers: list[Any], mixtures: Sequence[bool]) -> set[int]:
    layers = range(len(mixtures))
    fits = sorted({number for number in numbers if type(number) is int and number in layers})
    if not numbers or len(fits) != len(numbers):
        parts = [part for part in ("attention", "experts") if part in numbers and (any(mixtures) or part != "experts")]
        if fits or not parts:
            instead = f"[{','.join(map(str, fits or layers[:2]))}]" if numbers else "none"
        else:
            instead = " or ".join([*parts, "full"])
        raise RecipeError(f"train.recompute=[{','.join(map(str, numbers))}] must name layers from 0 to {layers[-1]}, each once; "
                          f"give train.recompute={instead}")  # fmt: skip
    return set(fits)


def _number(recompute: Any, prefix: str, example: str) -> int | None:
    """Returns N of the text `prefix`N; None if `recompute` does not begin with `prefix`."""
    if not isinstance(recompute, str) or not recompute.startswith(prefix):
        return None
    digits = recompute.removeprefix(prefix)
    if not (digits.isascii() and digits.isdigit() and int(digits)):
        raise RecipeError(f"train.recompute={recompute} must be {prefix}N with N of at least 1, e.g. train.recompute={example}")
    return int(digits)

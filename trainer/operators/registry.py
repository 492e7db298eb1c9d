"""The variants of the model's operators: those of this package, and those that other installed packages have registered. Does not
import torch.

An operator is a function that the model computes, such as attention, or the optimizer's `update`; `linear` is three, the methods of
`parallel.products.Products`. A variant is one way to compute it. Each has an entry named
OPERATOR.VARIANT, or OPERATOR.VARIANT.CHIP if only that chip has it (cpu, cuda, or the type that torch gives to the devices of
another accelerator): this package's in `_OWN`, others' under the entry point group `bagualu.operators`. The entry is a function;
what it is given and returns is said by the operator's default in `OperatorSet` (operator_set.py). It may have an attribute `takes`,
a function of the same arguments that returns whether the variant can compute them; the operator's default takes the place of one
that cannot. And it may have an attribute `lacks`, a function without arguments that returns what the variant needs and this machine
has not, such as "a C++ compiler", or None; or instead `lacks_on`, a function of the chip that returns the same for it. A third one,
`fails`, a function of the chip too, makes the variant ready and returns what it needs for that and this machine has not; the ranks
ask it before they agree on a variant that nobody has named, or that is generated.
"""

from importlib.metadata import EntryPoint, entry_points
from typing import Any

from bagualu.comm.errors import RecipeError

GROUP = "bagualu.operators"
AUTO = "auto"
"""The value of operators.NAME for which a variant is chosen."""
GENERATED = "generated"
"""The name of variants whose kernels torch's compiler generates, which takes time when a run begins: train.compile chooses them."""
DEFAULT_VARIANTS = {
    "norm": "eager", "rotary": "eager", "gate": "eager", "attention": "kernel", "loss": "eager", "linear": "torch",
    "update": "fused",
}  # fmt: skip
"""For each operator the variant that takes all arguments on every chip."""
FLOAT8_MULTIPLE = 16
"""GPUs multiply matrices in float8 only if widths are multiples of this."""
FLOAT8 = ("float8_rowwise", "float8_tensorwise")
"""This package's variants of `linear` for train.dtype=float8, the usual one first."""
_OWN = [
    EntryPoint("attention.blocks.cpu", "bagualu.trainer.operators.attention:attention_blocks", GROUP),
    EntryPoint("attention.kernel", "bagualu.trainer.operators.attention:attention_kernel", GROUP),
    EntryPoint("attention.tiles.cpu", "bagualu.trainer.operators.tiles:attention_tiles", GROUP),
    EntryPoint("gate.eager", "bagualu.trainer.operators.gate:silu_gate", GROUP),
    EntryPoint("gate.generated", "bagualu.trainer.operators.generated.gate:silu_gate", GROUP),
    EntryPoint("linear.float8_rowwise", "bagualu.trainer.operators.float8:float8_rowwise", GROUP),
    EntryPoint("linear.float8_tensorwise", "bagualu.trainer.operators.float8:float8_tensorwise", GROUP),
    EntryPoint("linear.panels.cpu", "bagualu.trainer.operators.panels:products_in_panels", GROUP),
    EntryPoint("linear.tiles.cpu", "bagualu.trainer.operators.products:products_in_tiles", GROUP),
    EntryPoint("linear.torch", "bagualu.parallel.products:torch_products", GROUP),
    EntryPoint("loss.eager", "bagualu.parallel.vocabulary:loss_and_gradient", GROUP),
    EntryPoint("loss.generated", "bagualu.trainer.operators.generated.loss:loss_and_gradient", GROUP),
    EntryPoint("norm.eager", "bagualu.trainer.operators.norm:normalise", GROUP),
    EntryPoint("norm.generated", "bagualu.trainer.operators.generated.norm:normalise", GROUP),
    EntryPoint("rotary.eager", "bagualu.trainer.operators.rotary:rotate", GROUP),
    EntryPoint("rotary.generated", "bagualu.trainer.operators.generated.rotary:rotate", GROUP),
    EntryPoint("update.fused", "bagualu.trainer.operators.update:adamw", GROUP),
    EntryPoint("update.generated", "bagualu.trainer.operators.generated.update:adamw", GROUP),
]
"""The entries of this package; one of another package with the same name on the same chip is not taken."""


def is_float8(variant: str, operator: str = "linear") -> bool:
    """Returns whether a variant is for train.dtype=float8: whether it is one of `linear` and its name begins with float8_, whoever
    has registered it. Such a variant rounds more than others, so that none is chosen by its time."""
    return operator == "linear" and variant.startswith("float8_")


def variants(operator: str, chip: str | None = None) -> dict[str, EntryPoint]:
    """Returns the variants of `operator` by name: those that `chip` has, or without it those of all chips."""
    others = sorted(entry_points(group=GROUP), key=lambda entry: entry.name)
    found = {_parts(entry)[1]: entry for entry in (*others, *_OWN) if _is_for(entry, operator, chip)}
    return dict(sorted(found.items()))


def require_variant(operator: str, variant: str, chip: str | None = None) -> None:
    """Raises RecipeError unless `variant` is registered for `operator` and, if the chip is known, for that chip, or is auto."""
    if variant == AUTO or _own(operator, variant, chip) is not None:
        return
    here, known = variants(operator, chip), variants(operator)
    if variant not in known:
        raise RecipeError(f"operators.{operator}={variant} is unknown; give one of {', '.join([AUTO, *known])}")
    if variant not in here:
        only = _parts(known[variant])[2]
        raise RecipeError(f"operators.{operator}={variant} is for {only} only, and the ranks compute on {chip}; "
                          f"give one of {', '.join([AUTO, *here])}")  # fmt: skip


def _own(operator: str, variant: str, chip: str | None) -> EntryPoint | None:
    """Returns this package's variant, if `chip` has it. No installed packages are searched, so that runs start quickly."""
    return next((entry for entry in _OWN if _is_for(entry, operator, chip) and _parts(entry)[1] == variant), None)


def _is_for(entry: EntryPoint, operator: str, chip: str | None) -> bool:
    named, _, only = _parts(entry)
    return named == operator and (not only or chip in (None, only))


def _parts(entry: EntryPoint) -> tuple[str, str, str]:
    """Returns operator, variant and chip; "" for every chip."""
    operator, variant, chip = (*entry.name.split("."), "", "")[:3]
    return operator, variant, chip


def load_variant(operator: str, variant: str, chip: str) -> Any:
    """Returns the function that is registered. Raises RecipeError if there is none, or if the package cannot be imported."""
    require_variant(operator, variant, chip)
    entry = _own(operator, variant, chip) or variants(operator, chip)[variant]
    try:
        return entry.load()
    except (ImportError, AttributeError) as error:
        raise RecipeError(f"operators.{operator}={variant} is registered as {entry.value}, which cannot be imported ({error}); "
                          f"install it again, or give operators.{operator}={AUTO}") from error  # fmt: skip

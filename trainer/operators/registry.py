"""The variants of the model's operators that installed packages have registered. Does not import torch.

An operator is a function that the model computes, such as attention. A variant is one way to compute it. A package registers its
variants under the entry point group `bagualu.operators`, each with the name OPERATOR.VARIANT, or OPERATOR.VARIANT.CHIP if only that
chip has it (cpu, cuda, or the type that torch gives to the devices of another accelerator). The entry is a function; what it is
given and returns is said by the operator's default in `OperatorSet` (operator_set.py). It may have an attribute `takes`, a function
of the same arguments that returns whether the variant can compute them; the operator's default takes the place of one that cannot.
"""

from importlib.metadata import EntryPoint, entry_points
from typing import Any

from bagualu.comm.errors import RecipeError

GROUP = "bagualu.operators"
AUTO = "auto"
"""The value of operators.NAME for which a variant is chosen."""
DEFAULT_VARIANTS = {"norm": "eager", "rotary": "eager", "gate": "eager", "attention": "kernel", "loss": "eager"}
"""For each operator the variant that takes all arguments on every chip."""


def variants(operator: str, chip: str | None = None) -> dict[str, EntryPoint]:
    """Returns the registered variants of `operator` by name: those that `chip` has, or without it those of all chips."""
    found: dict[str, EntryPoint] = {}
    for entry in sorted(entry_points(group=GROUP), key=lambda entry: entry.name):
        named, _, rest = entry.name.partition(".")
        name, _, only = rest.partition(".")
        if named == operator and (not only or chip is None or only == chip):  # one for this chip alone comes last, and counts
            found[name] = entry
    return found


def require_variant(operator: str, variant: str, chip: str | None = None) -> None:
    """Raises RecipeError unless `variant` is registered for `operator` and, if the chip is known, for that chip, or is auto."""
    if variant == AUTO:
        return
    known = variants(operator)
    if variant not in known:
        raise RecipeError(f"operators.{operator}={variant} is unknown; give one of {', '.join([AUTO, *known])}")
    here = variants(operator, chip)
    if variant not in here:
        others = sorted({entry.name.split(".")[2] for entry in entry_points(group=GROUP)
                         if entry.name.startswith(f"{operator}.{variant}.")})  # fmt: skip
        raise RecipeError(f"operators.{operator}={variant} is for {' and '.join(others)} only, and the ranks compute on {chip}; "
                          f"give one of {', '.join([AUTO, *here])}")  # fmt: skip


def load_variant(operator: str, variant: str, chip: str) -> Any:
    """Returns the function that is registered. Raises RecipeError if there is none, or if the package cannot be imported."""
    require_variant(operator, variant, chip)
    entry = variants(operator, chip)[variant]
    try:
        return entry.load()
    except (ImportError, AttributeError) as error:
        raise RecipeError(f"operators.{operator}={variant} is registered as {entry.value}, which cannot be imported ({error}); "
                          f"install it again, or give operators.{operator}={AUTO}") from error  # fmt: skip

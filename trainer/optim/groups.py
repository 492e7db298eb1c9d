"""Groups of parameters that the optimizer treats in a way of their own: `optim.groups`."""

from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

from bagualu.comm.errors import RecipeError

EXAMPLE = '[{pattern: "*norm.weight", lr: 1e-4}]'
"""A value of `optim.groups`, as typed."""
_EXAMPLE = f"e.g. 'optim.groups={EXAMPLE}'"


@dataclass(frozen=True)
class Treatment:
    """How the optimizer treats a parameter."""

    lr_factor: float
    """Multiplies the learning rate of every step."""
    weight_decay: float
    optimizer: str
    """adamw | lion | muon | sgd"""


@dataclass(frozen=True)
class ParameterGroup:
    """An entry of `optim.groups`. A parameter belongs to the first entry whose pattern matches its global name."""

    pattern: str
    """Shell-style, e.g. "*norm.weight" or "layers.0.*"."""
    lr: float | None = None
    """Takes the place of optim.lr; None for no change."""
    weight_decay: float | None = None
    """Takes the place of optim.weight_decay, for parameters of any number of dims; None for no change."""
    optimizer: str | None = None
    """adamw or muon under optim.name=muon; None for no change."""
    frozen: bool = False
    """Whether the parameters are not trained at all: they have no gradient and no optimizer state."""

    @staticmethod
    def read(entry: Any) -> "ParameterGroup":
        """Returns the group that an entry of the recipe describes. Raises RecipeError for an entry that describes none."""
        if not isinstance(entry, dict) or not isinstance(entry.get("pattern"), str):
            raise RecipeError(f"optim.groups: {entry} has no pattern of parameter names; {_EXAMPLE}")
        for key in entry.keys() - {"pattern", "lr", "weight_decay", "optimizer", "frozen"}:
            raise RecipeError(f"optim.groups: {entry} has the unknown key {key}; there are pattern, lr, weight_decay, optimizer "
                              f"and frozen, {_EXAMPLE}")  # fmt: skip
        for key in ("lr", "weight_decay"):
            value = entry.get(key)
            number = isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value < float("inf")
            if value is not None and not number:
                raise RecipeError(f"optim.groups: {key}={value} of {entry['pattern']} must be a number of at least 0; {_EXAMPLE}")
        if entry.get("optimizer") not in (None, "adamw", "muon"):
            raise RecipeError(f"optim.groups: optimizer={entry['optimizer']} of {entry['pattern']} must be adamw or muon")
        if not isinstance(entry.get("frozen", False), bool):
            raise RecipeError(f"optim.groups: frozen={entry['frozen']} of {entry['pattern']} must be true or false")
        changes = [key for key in ("lr", "weight_decay", "optimizer") if entry.get(key) is not None]
        if entry.get("frozen") and changes:
            raise RecipeError(f"optim.groups: {changes[0]} of {entry['pattern']} has no effect with frozen: true; leave one out")
        if not entry.get("frozen") and not changes:
            raise RecipeError(f"optim.groups: {entry['pattern']} changes nothing; give it an lr, a weight_decay, an optimizer or "
                              f"frozen: true, {_EXAMPLE}")  # fmt: skip
        return ParameterGroup(**entry)


def group_of(groups: Sequence[ParameterGroup], name: str) -> ParameterGroup | None:
    """Returns the first group whose pattern matches the parameter `name`; None if there is none."""
    return next((group for group in groups if fnmatchcase(name, group.pattern)), None)

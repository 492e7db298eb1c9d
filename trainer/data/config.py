"""The data as a recipe describes it. Free of torch."""

from dataclasses import dataclass, field

from bagualu.comm.checks import require_at_least, require_at_most, require_known_home, require_text
from bagualu.comm.errors import RecipeError

LARGEST = 2**24
"""Sequences of a step, and tokens of a sequence; every rank knows the numbers of all of the former."""


@dataclass
class DataConfig:
    """`data.*` of a recipe."""

    source: str = field(default="stdlib", metadata={"path": True})
    """stdlib: the sources of Python's own standard library; random: uniform random tokens; else a text file or a folder of them."""
    sequence_length: int = 256
    """Tokens a sequence predicts; one more is read."""
    global_batch: int = 16
    """Sequences per optimizer step, over all ranks."""
    validation_fraction: float = 0.05
    """Share of the files kept for validation, chosen by a hash of their path."""
    cache: str | None = field(default=None, metadata={"path": True})
    """Folder of prepared corpora; left out, $XDG_CACHE_HOME/bagualu or ~/.cache/bagualu."""

    def validate(self) -> None:
        require_text("data", self, source="stdlib")
        require_known_home("data", self, "source", "cache")
        require_at_least(1, "data", self, "sequence_length", "global_batch")
        require_at_most(LARGEST, "data", self, "sequence_length", "global_batch")
        if not 0 < self.validation_fraction < 1:
            raise RecipeError(f"data.validation_fraction={self.validation_fraction} must lie between 0 and 1, e.g. 0.05")

"""What is to be evaluated, without torch."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path

_FILE = "evaluate.json"


@dataclass(frozen=True)
class EvaluateRequest:
    """Everything that the ranks need to know besides the recipe."""

    checkpoint: str
    run_dir: str
    own_data: bool
    """Whether the text is that of the run: of this, what the run kept for validation is evaluated, of other text all."""
    kept: bool
    """Whether the run keeps text for validation."""
    context: int | None
    """The most tokens of a sequence, for text whose length decides how long sequences are; None: data.sequence_length is."""
    sequences: int | None
    """The most sequences to evaluate, spread evenly over all; None: all."""

    def save(self, folder: Path) -> None:
        (folder / _FILE).write_text(json.dumps(asdict(self)))

    @staticmethod
    def load(folder: Path) -> "EvaluateRequest":
        return EvaluateRequest(**json.loads((folder / _FILE).read_text()))

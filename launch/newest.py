"""What the launcher says of a run's newest checkpoint. Storage that fails or hangs costs it these words only. Free of torch."""

from pathlib import Path

from bagualu.fault_tolerance.checkpoint.directory import latest
from bagualu.fault_tolerance.checkpoint.fence import EPOCH
from bagualu.fault_tolerance.checkpoint.writer import Writer
from bagualu.trainer.config import Recipe
from bagualu.trainer.preflight import has_begun

_PATIENCE_SECONDS = 5.0
_UNKNOWN = "its newest checkpoint, when its storage answers"


def newest(recipe: Recipe) -> str | None:
    """What the run would go on from, for people; None when there is no checkpoint."""
    writer = Writer(0)
    outcome = writer.submit(_look, Path(recipe.run.dir)).wait(_PATIENCE_SECONDS)
    writer.close(0)
    found: str | None = outcome.get("done", _UNKNOWN)
    return found


def _look(directory: Path) -> str | None:
    """Raises OSError."""
    checkpoints = directory / "checkpoints"
    if found := latest(checkpoints):
        return found.name
    return _UNKNOWN if has_begun(directory) and not (checkpoints / EPOCH).exists() else None

"""Whether a run has begun, so that its checkpoints are somewhere. Free of torch."""

from pathlib import Path

BEGUN = "begun"
"""File of a launch's scratch folder: a start of it has had the run's checkpoints."""


def has_begun(directory: Path) -> bool:
    """Whether steps were done in the run directory, by what a run makes after it has taken its checkpoints. Raises OSError."""
    metrics = directory / "metrics.jsonl"
    return metrics.exists() and metrics.stat().st_size > 0

"""What a run that ended well says last."""

from collections.abc import Sequence
from typing import Any

from bagualu.trainer.progress import next_commands, summary_text


def closing(summary: dict[str, Any], overrides: Sequence[str] | None = None) -> str:
    """The summary, and after `bagualu train OVERRIDES` what to type next."""
    told = {**summary, "ended": summary["status"], "seconds": summary.get("wall_seconds")}
    following = [] if overrides is None else next_commands(overrides, summary["step"], summary["steps"])
    return summary_text(told, following)

"""Warns of surprising learning rates before a run begins or resumes."""

import json
import math
from pathlib import Path

from bagualu.fault_tolerance.run_directory import RunDirectory
from bagualu.trainer.optim.schedule import learning_rate, same_curve
from bagualu.trainer.recipe.config import Recipe


def remarks(recipe: Recipe, done: int) -> list[str]:
    """Returns a list of warnings for a run that has done `done` steps: about a warmup that takes all steps, and a learning rate
    that jumps on resuming."""
    optim, steps = recipe.optim, recipe.train.steps
    lines = []
    if done < steps <= optim.warmup_steps:
        last = learning_rate(optim, steps - 1, steps)
        reached = "reached only in the last step" if steps == optim.warmup_steps else f"never reached: the last step has {last:.3g}"
        lines.append(f"learning rate: optim.warmup_steps={optim.warmup_steps} takes all of train.steps={steps}, so optim.lr="
                     f"{optim.lr:g} is {reached}")  # fmt: skip
    before = _recorded(RunDirectory(recipe.run.dir).metrics, done) if 0 < done < steps else None
    if before is not None and not same_curve(optim, done - 1, steps, before):
        now = learning_rate(optim, done, steps)
        times = f", {now / before:.3g} times as much" if before > 0 else ""
        lines.append(f"learning rate: step {done} had {before:.3g}, step {done + 1} has {now:.3g}{times}, since optim.schedule="
                     f"{optim.schedule} with optim.lr={optim.lr:g}, optim.warmup_steps={optim.warmup_steps} and train.steps={steps}"
                     " is not the curve that the run was on")  # fmt: skip
    return lines


def _recorded(metrics: Path, step: int) -> float | None:
    """Returns the learning rate of step `step` (from 1) from the metrics file; None if the file cannot be read or has no finite
    rate for that step."""
    try:
        lines = metrics.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return None
    for line in reversed(lines):
        try:
            record = json.loads(line)
            if record["step"] == step:
                rate = float(record["lr"])
                return rate if math.isfinite(rate) else None
        except (ValueError, TypeError, KeyError):
            continue
    return None

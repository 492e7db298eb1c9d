"""The learning rate as a pure function of the step."""

import math

from bagualu.trainer.optim.config import OptimConfig


def learning_rate(config: OptimConfig, step: int, steps: int) -> float:
    """Returns the rate of step `step` (from 0) of `steps`: linear warmup, then cosine, warmup-stable-decay or constant.

    The last step of the warmup has the rate lr, and so has the first step after it, where cosine and the stable part of wsd begin.
    cosine then falls to final_lr_ratio * lr in the last step (arXiv 1608.03983); wsd stays at lr and falls linearly to the same
    rate in the last decay_fraction of all steps (arXiv 2404.06395). No step has the rate 0: a final_lr_ratio of 0 would be reached
    one step after the last. docs/guides/learning_rate.md shows the curves.
    """
    if step < config.warmup_steps:
        return config.lr * (step + 1) / config.warmup_steps
    low = config.final_lr_ratio
    end = steps - 1 if low > 0 else steps  # the step that has the final rate
    if config.schedule == "cosine":
        progress = min(1.0, (step - config.warmup_steps) / max(1, end - config.warmup_steps))
        return config.lr * (low + (1 - low) * 0.5 * (1 + math.cos(math.pi * progress)))
    if config.schedule == "wsd":
        stable = steps - 1 - config.decay_steps(steps)  # the last step at the full rate
        progress = min(1.0, max(0, step - stable) / max(1, end - stable))
        return config.lr * (1 - (1 - low) * progress)
    return config.lr


def same_curve(config: OptimConfig, step: int, steps: int, rate: float) -> bool:
    """Returns whether a run of `steps` steps with `config` has the learning rate `rate`, to within 1%, in step `step` (from 0)."""
    return math.isclose(learning_rate(config, step, steps), rate, rel_tol=0.01)

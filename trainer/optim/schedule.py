"""The learning rate as a pure function of the step."""

import math

from bagualu.trainer.optim.config import OptimConfig


def learning_rate(config: OptimConfig, step: int, steps: int) -> float:
    """Rate of step `step` (from 0) of `steps`: linear warmup, then cosine, warmup-stable-decay or constant.

    cosine falls from lr to final_lr_ratio * lr over the steps after the warmup (arXiv 1608.03983); wsd stays at lr and falls
    there linearly over the last decay_fraction of all steps (arXiv 2404.06395).
    """
    if step < config.warmup_steps:
        return config.lr * (step + 1) / config.warmup_steps
    low = config.final_lr_ratio
    if config.schedule == "cosine":
        progress = min(1.0, (step - config.warmup_steps) / max(1, steps - 1 - config.warmup_steps))
        return config.lr * (low + (1 - low) * 0.5 * (1 + math.cos(math.pi * progress)))
    if config.schedule == "wsd":
        decay_steps = round(config.decay_fraction * steps)
        progress = min(1.0, max(0.0, (step - (steps - 1 - decay_steps)) / decay_steps)) if decay_steps else 0.0
        return config.lr * (1 - (1 - low) * progress)
    return config.lr

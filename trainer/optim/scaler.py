"""Dynamic loss scaling for float16 (arXiv 1710.03740, section 3.2): the scale doubles after many steps with finite gradients in a
row, and is halved after a step whose gradients are not finite, but never below 1."""

from dataclasses import dataclass


@dataclass
class LossScaler:
    """Holds the loss scale. `enabled` is true only for float16; otherwise the scale is always 1."""

    enabled: bool
    scale: float = 1.0
    good_steps: int = 0
    """Steps in a row, up to the latest, whose gradients were finite."""
    growth_interval: int = 2000
    """The scale doubles whenever `good_steps` is a multiple of this."""

    @staticmethod
    def for_dtype(dtype: str) -> "LossScaler":
        return LossScaler(True, 2.0**16) if dtype == "float16" else LossScaler(False)

    @property
    def can_fall(self) -> bool:
        """Whether gradients that are not finite might be finite with a smaller scale."""
        return self.enabled and self.scale > 1.0

    def update(self, finite: bool) -> None:
        """Adjusts the loss scale after a step, given whether its gradients were finite. The caller discards a step with gradients
        that are not."""
        if not self.enabled:
            return
        self.good_steps = self.good_steps + 1 if finite else 0
        if not finite:
            self.scale = max(1.0, self.scale / 2)
        elif self.good_steps % self.growth_interval == 0:
            self.scale *= 2

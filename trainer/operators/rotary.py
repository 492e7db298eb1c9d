"""Rotary positions. Shapes: B batch, A heads, S sequence, D head width."""

import math
from dataclasses import dataclass
from typing import Any

import torch

from bagualu.parallel.precision import accurate_dtype, chip_of


@dataclass(frozen=True)
class Scaling:
    """Slows down all rotations by `factor` for sequences longer than those of an earlier training (arXiv 2306.15595)."""

    factor: float

    def __call__(self, speeds: torch.Tensor) -> torch.Tensor:
        """speeds [D / 2], angles by which a position is rotated -> the speeds to use instead"""
        return speeds / self.factor

    def _partly(self, speeds: torch.Tensor, kept: torch.Tensor) -> torch.Tensor:
        """Interpolates between the speeds themselves, where `kept` [D / 2] is 1, and the slowed ones, where it is 0."""
        return speeds * (kept + (1 - kept) / self.factor)


@dataclass(frozen=True)
class SlowRotations(Scaling):
    """Slows down slow rotations, as Llama 3.1 does (arXiv 2407.21783; the formula is that of the authors' code): a rotation that
    turns at most `low` times within `positions` tokens is `factor` times slower, a rotation that turns at least `high` times is
    unchanged, and between the two the speed is interpolated by the number of turns."""

    low: float
    high: float
    positions: int

    def __call__(self, speeds: torch.Tensor) -> torch.Tensor:
        turns = self.positions * speeds / (2 * math.pi)
        return self._partly(speeds, ((turns - self.low) / (self.high - self.low)).clamp(0, 1))


@dataclass(frozen=True)
class Yarn(SlowRotations):
    """The same with an interpolation by the index of the speed (arXiv 2309.00071, section 3.2, in the form of the authors' code:
    the indices between which it interpolates are whole numbers). `theta` is the base of the speeds."""

    theta: float

    def __call__(self, speeds: torch.Tensor) -> torch.Tensor:
        width = 2 * len(speeds)
        first = max(math.floor(self._index(self.high, width)), 0)
        last = min(math.ceil(self._index(self.low, width)), width - 1)
        indices = torch.arange(len(speeds), dtype=speeds.dtype, device=speeds.device)
        return self._partly(speeds, 1 - ((indices - first) / ((last - first) or 0.001)).clamp(0, 1))

    def _index(self, turns: float, width: int) -> float:
        """Returns the index of the speed that turns so many times within `positions` tokens."""
        return width * math.log(self.positions / (turns * 2 * math.pi)) / (2 * math.log(self.theta))


class RotaryPositions:
    """Returns, when called, cos and sin [S, D] of the angles position * theta^(-2i / D), with the speeds theta^(-2i / D) changed by
    `scaling`, both multiplied by `amplitude`, for `rotate`, computed in float64 and returned in at least float32. It keeps only the
    latest result."""

    def __init__(self, head_dim: int, theta: float, scaling: Scaling | None = None, amplitude: float = 1.0) -> None:
        self.head_dim = head_dim
        self.theta = theta
        self.scaling = scaling
        self.amplitude = amplitude
        self._kept: dict[tuple[int, torch.dtype, torch.device], tuple[torch.Tensor, torch.Tensor]] = {}

    def __eq__(self, other: object) -> bool:
        """Whether `other` gives the same angles."""
        return isinstance(other, RotaryPositions) and self._values == other._values

    def __hash__(self) -> int:
        return hash(self._values)

    @property
    def _values(self) -> tuple[object, ...]:
        return self.head_dim, self.theta, self.scaling, self.amplitude

    def __call__(self, length: int, dtype: torch.dtype, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        key = (length, dtype, device)
        if key not in self._kept:
            steps = torch.arange(0, self.head_dim, 2, dtype=torch.float64, device=device)
            speeds = self.theta ** (-steps / self.head_dim)
            if self.scaling is not None:
                speeds = self.scaling(speeds)
            angles = torch.arange(length, dtype=torch.float64, device=device).outer(speeds)
            both = torch.cat((-angles, angles), -1)
            wide = accurate_dtype(dtype)
            self._kept = {key: (both.cos().mul_(self.amplitude).to(wide), both.sin().mul_(self.amplitude).to(wide))}
        return self._kept[key]


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Returns x [B, S, A, D] with each pair of elements (i, i + D / 2) rotated by its angle (arXiv 2104.09864, section 3.2.2, in
    the half-split order of Llama weights published in Hugging Face form). cos and sin [S, D], or [B, S, D] for sequences with
    positions of their own, hold each angle twice; the first sine is negated. A factor of both is one of the result."""
    if not torch.is_grad_enabled():
        return _rotated(x, cos, sin, 1)
    rotated: torch.Tensor = _Rotate.apply(x, cos, sin)
    return rotated


class _Rotate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(cos, sin)
        return _rotated(x, cos, sin, 1)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        cos, sin = ctx.saved_tensors
        return _rotated(grads[0], cos, sin, -1), None, None  # the transpose of a rotation is the rotation by the opposite angle


def _rotated(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, direction: int) -> torch.Tensor:
    if chip_of(x.device) == "cuda":
        return _rotated_by_halves(x, cos, sin, direction)
    other = x.roll(x.shape[-1] // 2, -1).to(cos.dtype)
    return (x.to(cos.dtype) * cos.unsqueeze(-2)).addcmul_(other, sin.unsqueeze(-2), value=direction).to(x.dtype)


def _rotated_by_halves(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, direction: int) -> torch.Tensor:
    """Returns bit for bit what the formula in `_rotated` gives, with less memory traffic, on devices whose kernels convert dtypes
    while they read and write."""
    rotated, half = torch.empty_like(x), x.shape[-1] // 2
    low, high = slice(half), slice(half, None)
    for here, there in ((low, high), (high, low)):
        turned = x[..., here] * cos[..., None, here]
        torch.addcmul(turned, x[..., there], sin[..., None, here], value=direction, out=rotated[..., here])
    return rotated

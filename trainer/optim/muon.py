"""Muon's orthogonalisation of whole matrices (https://kellerjordan.github.io/posts/muon/), as in torch.optim.Muon.

Shapes: n matrices [A, B].
"""

import math

import torch

from bagualu.parallel.precision import multiply_dtype

_COEFFICIENTS = (3.4445, -4.7750, 2.0315)
_ITERATIONS = 5
_LEAST_NORM = 1e-7


def orthogonalise(matrices: torch.Tensor) -> torch.Tensor:
    """Returns for each of `matrices` [n, A, B] a matrix with the same singular vectors, whose singular values are about 1.

    It is the quintic Newton-Schulz iteration X <- a X + (b G + c G^2) X with G = X X^T, five times, which brings singular values to
    between about 0.7 and 1.2.
    """
    a, b, c = _COEFFICIENTS
    tall = matrices.shape[1] > matrices.shape[2]
    x = (matrices.mT if tall else matrices).to(multiply_dtype(matrices))
    x = x / torch.linalg.vector_norm(x, dim=(1, 2), keepdim=True).clamp(min=_LEAST_NORM)
    for _ in range(_ITERATIONS):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if tall else x


def cost(rows: int, columns: int) -> float:
    """Returns the multiplications of an iteration of `orthogonalise` for a matrix [rows, columns]."""
    short, long = sorted((rows, columns))
    return float(short * short * (2 * long + short))


def adjustment(adjust_lr: str, shape: tuple[int, ...]) -> float:
    """Returns by what the learning rate of the matrices in a tensor of `shape` [..., A, B] is multiplied; `adjust_lr` as in
    OptimConfig."""
    rows, columns = shape[-2:]
    return 0.2 * math.sqrt(max(rows, columns)) if adjust_lr == "match_rms_adamw" else math.sqrt(max(1.0, rows / columns))

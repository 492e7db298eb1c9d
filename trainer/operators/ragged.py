"""Pads the rows of experts, of which there is another number in every step, so that matrix products meet few shapes.

On a CPU the library of 16-bit products generates code for each number of rows that it has not met before. For the products of
bench_moe that takes 0.5 ms with AVX-512 and 2.5 to 7 ms with AMX, as long as the product itself or longer, and what the library
keeps of each breaks up the free memory.

Shapes: N rows, P rows with padding, I width.
"""

import torch

from bagualu.parallel.config import EXPERT_ROWS_MULTIPLE
from bagualu.parallel.product_shapes import generates_code


def pad(rows: torch.Tensor, counts: list[int]) -> tuple[torch.Tensor, list[int]]:
    """Returns rows [P, I] and their counts, given rows [N, I] of which consecutive counts[e] belong to expert e: each expert's rows
    are followed by zeros. Where the chip does not care, returns what was given."""
    if not generates_code(rows):
        return rows, counts
    padded = [-(-count // EXPERT_ROWS_MULTIPLE) * EXPERT_ROWS_MULTIPLE for count in counts]
    if padded == counts:
        return rows, counts
    zeros = rows.new_zeros(EXPERT_ROWS_MULTIPLE, rows.shape[1])
    pieces = [(part, zeros[: after - before]) for part, before, after in zip(rows.split(counts), counts, padded, strict=True)]
    return torch.cat([piece for pair in pieces for piece in pair]), padded


def unpad(rows: torch.Tensor, counts: list[int], padded: list[int]) -> torch.Tensor:
    """Returns the rows [N, I] that `pad` did not add, given rows [P, I]; no gradient comes from those that it added."""
    if padded == counts:
        return rows
    sizes = [size for before, after in zip(counts, padded, strict=True) for size in (before, after - before)]
    return torch.cat(rows.split(sizes)[::2])

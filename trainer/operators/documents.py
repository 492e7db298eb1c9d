"""Several documents in a row: which keys a token sees, and its position.

Shapes: B rows, S sequence. documents [B, S]: the position in the row at which the document of each token begins.
"""

import torch


def document_mask(documents: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Returns what is added to the scores of attention [B, 1, S, S]: 0 for the keys of a token's own document up to the token
    itself, else minus infinity. One tensor serves all layers, which keep it for their backward passes."""
    positions = torch.arange(documents.shape[1], device=documents.device)
    seen = (positions <= positions.unsqueeze(1)) & (positions >= documents.unsqueeze(-1))
    return torch.zeros(seen.shape, dtype=dtype, device=documents.device).masked_fill_(~seen, -torch.inf).unsqueeze(1)


def positions_in(documents: torch.Tensor) -> torch.Tensor:
    """Returns the position of each token in its document [B, S]."""
    return torch.arange(documents.shape[1], device=documents.device) - documents

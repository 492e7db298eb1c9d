"""Chooses the next token of each sequence from its logits.

Shapes: B sequences, V vocabulary.
"""

import hashlib
from collections.abc import Sequence

import torch

from bagualu.trainer.generation.request import Sampling


def choose(
    logits: torch.Tensor, histories: Sequence[Sequence[int]], sampling: Sampling, prompts: Sequence[int], number: int
) -> torch.Tensor:
    """Returns the next token of each sequence [B], given logits [B, V]. `histories`: the tokens of each sequence so far, with its
    prompt. `prompts`: the number of each prompt; `number`: how many tokens each has been given so far."""
    scores = logits.double()
    if sampling.repetition_penalty != 1:
        scores = scores.clone()  # of float64 logits, double() is no copy
        for row, history in zip(scores, histories, strict=True):
            _penalise(row, history, sampling.repetition_penalty)
    if sampling.temperature == 0:
        return scores.argmax(-1)
    probabilities = (scores / sampling.temperature).softmax(-1)
    if sampling.top_p < 1:
        probabilities = _nucleus(probabilities, sampling.top_p)
    if sampling.min_p > 0:
        least = sampling.min_p * probabilities.amax(-1, keepdim=True)
        probabilities = probabilities.masked_fill(probabilities < least, 0)
    drawn = [_uniform(sampling.seed, prompt, number) for prompt in prompts]
    return _inverse(probabilities, torch.tensor(drawn, dtype=torch.float64, device=logits.device))


def _penalise(row: torch.Tensor, history: Sequence[int], penalty: float) -> None:
    tokens = torch.tensor(sorted(set(history)), dtype=torch.int64, device=row.device)
    scores = row[tokens]
    row[tokens] = torch.where(scores > 0, scores / penalty, scores * penalty)


def _nucleus(probabilities: torch.Tensor, top_p: float) -> torch.Tensor:
    """Returns the probabilities [B, V] with zeros but for the fewest most probable tokens that have `top_p` together."""
    ordered, tokens = probabilities.sort(dim=-1, descending=True, stable=True)
    before = ordered.cumsum(-1) - ordered  # that of all more probable tokens
    return torch.zeros_like(probabilities).scatter(-1, tokens, ordered.masked_fill(before >= top_p, 0))


def _uniform(seed: int, prompt: int, number: int) -> float:
    """Returns a number from [0, 1), a function of the arguments."""
    digest = hashlib.blake2b(f"{seed}/{prompt}/{number}".encode(), digest_size=8).digest()
    return (int.from_bytes(digest, "big") >> 11) / 2**53


def _inverse(weights: torch.Tensor, drawn: torch.Tensor) -> torch.Tensor:
    """Returns for each row the token at which the sum of weights [B, V] passes the fraction `drawn` [B] of their total."""
    sums = weights.cumsum(-1)
    tokens = torch.searchsorted(sums, (drawn * sums[:, -1]).unsqueeze(-1), right=True).squeeze(-1)
    last = weights.shape[-1] - 1 - (weights > 0).flip(-1).int().argmax(-1)  # rounding may lead beyond the last possible token
    return torch.minimum(tokens, last)

"""The choice of the next token."""

from collections import Counter

import pytest
import torch

from bagualu.trainer.generation.request import Sampling
from bagualu.trainer.generation.sample import choose

PROBABILITIES = torch.tensor([0.5, 0.05, 0.3, 0.15])
LOGITS = PROBABILITIES.log().unsqueeze(0)


def drawn(count=2000, history=(), logits=LOGITS, **options):
    """How often each token is drawn, as fractions."""
    sampling = Sampling(**{"temperature": 1.0, **options})
    tokens = [int(choose(logits, [list(history)], sampling, [prompt], 3)) for prompt in range(count)]
    return {token: times / count for token, times in Counter(tokens).items()}


def test_without_a_temperature_the_most_probable_token_is_taken():
    logits = torch.tensor([[0.0, 2.0, 1.0], [-1.0, -3.0, -2.0]])
    assert choose(logits, [[], []], Sampling(), [0, 1], 0).tolist() == [1, 0]


@pytest.mark.parametrize("temperature", [1.0, 0.5, 3.0])
def test_tokens_are_drawn_by_their_probabilities(temperature):
    wanted = (LOGITS[0] / temperature).softmax(-1)
    shares = drawn(temperature=temperature)
    assert [shares.get(token, 0) for token in range(4)] == pytest.approx(wanted.tolist(), abs=0.04)


@pytest.mark.parametrize(
    ("options", "kept"),
    [
        ({"top_p": 0.49}, {0}),
        ({"top_p": 0.51}, {0, 2}),
        ({"top_p": 0.9}, {0, 2, 3}),
        ({"top_p": 1e-6}, {0}),
        ({"min_p": 0.29}, {0, 2, 3}),
        ({"min_p": 0.31}, {0, 2}),
        ({"min_p": 1.0}, {0}),
        ({"top_p": 0.9, "min_p": 0.5}, {0, 2}),
        ({"min_p": 0.5, "temperature": 2.0}, {0, 2, 3}),  # after the temperature
    ],
)
def test_improbable_tokens_are_left_out_and_the_others_keep_their_odds(options, kept):
    shares = drawn(**options)
    assert set(shares) == kept
    if options.get("temperature", 1) == 1:
        total = sum(float(PROBABILITIES[token]) for token in kept)
        for token in kept:
            assert shares[token] == pytest.approx(float(PROBABILITIES[token]) / total, abs=0.04)


def test_tokens_that_were_there_are_penalised():
    logits = torch.tensor([[2.0, 1.5, -1.0, -1.5]])
    penalised = Sampling(repetition_penalty=2.0)
    assert choose(logits, [[]], penalised, [0], 0).item() == 0
    assert choose(logits, [[0, 0]], penalised, [0], 0).item() == 1
    assert choose(logits - 3, [[0, 1]], penalised, [0], 0).item() == 0, "-1 becomes -2, -1.5 becomes -3, and both are before -4"
    assert choose(logits - 3, [[0]], Sampling(repetition_penalty=4.0), [0], 0).item() == 1
    assert logits.tolist() == [[2.0, 1.5, -1.0, -1.5]]
    wide = logits.double()
    choose(wide, [[0]], penalised, [0], 0)
    assert wide.tolist() == logits.tolist(), "the logits themselves do not change"


def test_what_is_drawn_depends_on_seed_prompt_and_number_and_not_on_the_batch():
    logits = torch.zeros(1, 50)
    many = logits.expand(8, 50)
    sampling = Sampling(temperature=1.0, seed=5)
    together = choose(many, [[]] * 8, sampling, range(8), 2).tolist()
    alone = [choose(logits, [[]], sampling, [prompt], 2).item() for prompt in range(8)]
    assert together == alone
    assert len(set(alone)) > 3
    assert alone != choose(many, [[]] * 8, sampling, range(8), 3).tolist()
    assert alone != choose(many, [[]] * 8, Sampling(temperature=1.0, seed=6), range(8), 2).tolist()


def test_a_token_without_probability_is_never_drawn():
    logits = torch.tensor([[-torch.inf, 0.0, -torch.inf]])
    assert drawn(200, logits=logits) == {1: 1.0}

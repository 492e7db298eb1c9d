"""Embedding and loss with the vocabulary split over ranks, against the whole ones."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F

from bagualu.comm.group import Communicator
from bagualu.parallel import vocabulary
from bagualu.parallel.config import HEAD_CHUNK_TOKENS
from bagualu.parallel.vocabulary import IGNORED, linear_cross_entropy, sharded_embedding
from tests.harness import BACKENDS, run

BATCH, LENGTH, HIDDEN, REAL = 2, 4, 3, 5
ROWS = 8
"""Of them 5 real: with 4 ranks of 2 rows the third has a row of padding and the fourth nothing else."""


def drawn(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)) * 3


def own_rows(whole: torch.Tensor, communicator: Communicator) -> torch.Tensor:
    return whole.chunk(communicator.size)[communicator.rank].clone().requires_grad_()


def embedding(communicator: Communicator, sequence: bool) -> None:
    tokens = torch.tensor([[0, 4, 3, 1], [2, 2, 4, 0]])
    whole = drawn(ROWS, HIDDEN, seed=1).requires_grad_()
    weight = own_rows(whole.detach(), communicator)
    output = sharded_embedding(tokens, weight, communicator.world, sequence)
    expected = F.embedding(tokens, whole)
    seed = drawn(BATCH, LENGTH, HIDDEN, seed=2)
    expected.backward(seed)
    if sequence:
        expected, seed = (t.chunk(communicator.size, dim=1)[communicator.rank] for t in (expected, seed))
    torch.testing.assert_close(output, expected, rtol=1e-14, atol=0)
    output.backward(seed)
    torch.testing.assert_close(weight.grad, whole.grad.chunk(communicator.size)[communicator.rank], rtol=1e-14, atol=0)


@pytest.mark.parametrize("sequence", [False, True])
@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("backend", BACKENDS)
def test_embedding_is_that_of_the_whole_table(backend: str, size: int, sequence: bool) -> None:
    run(backend, size, embedding, sequence)


def loss(communicator: Communicator, rows: int) -> None:
    """In chunks of `rows` tokens."""
    kept = vocabulary.HEAD_CHUNK_TOKENS
    communicator.world.barrier()  # of ranks that are threads all have read it before one changes it
    try:
        vocabulary.HEAD_CHUNK_TOKENS = rows
        x = drawn(7, HIDDEN, seed=3).requires_grad_()
        whole = drawn(ROWS, HIDDEN, seed=4).requires_grad_()
        labels = torch.tensor([0, IGNORED, 4, 2, 3, 4, IGNORED])
        logits = x @ whole[:REAL].T
        expected = F.cross_entropy(logits, labels, ignore_index=IGNORED, reduction="sum")
        (expected * 0.3).backward()
        own_x, weight = x.detach().clone().requires_grad_(), own_rows(whole.detach(), communicator)
        found = linear_cross_entropy(own_x, weight, labels, REAL, communicator.world)
        torch.testing.assert_close(found, expected, rtol=1e-13, atol=0)
        (found * 0.3).backward()
        torch.testing.assert_close(weight.grad, whole.grad.chunk(communicator.size)[communicator.rank], rtol=1e-12, atol=1e-14)
        communicator.world.all_reduce(own_x.grad)  # each rank holds its part of the sum
        torch.testing.assert_close(own_x.grad, x.grad, rtol=1e-12, atol=1e-14)
        communicator.world.barrier()  # and are done with it
    finally:
        vocabulary.HEAD_CHUNK_TOKENS = kept


@pytest.mark.parametrize("rows", [1, 2, 2**10])
@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("backend", BACKENDS)
def test_loss_is_that_of_the_whole_softmax(backend: str, size: int, rows: int) -> None:
    run(backend, size, partial(loss, rows=rows))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_frequent_token_gets_its_whole_gradient_in_16_bits(dtype: torch.dtype) -> None:
    """Added up in bfloat16, 2,048 ones stop at 256."""
    weight = torch.zeros(3, HIDDEN, dtype=dtype, requires_grad=True)
    weight.grad_dtype = torch.float32
    vocabulary.embedding(torch.full((8, 256), 1), weight).backward(torch.ones(8, 256, HIDDEN, dtype=dtype))
    assert torch.equal(weight.grad, torch.tensor([0.0, 2048.0, 0.0]).unsqueeze(1).expand(3, HIDDEN))


def test_without_gradients_the_loss_makes_none(monkeypatch: pytest.MonkeyPatch) -> None:
    """Validation must not pay for the head's gradients, which autograd reports as needed even under no_grad."""
    x, weight = drawn(7, HIDDEN, seed=3), drawn(ROWS, HIDDEN, seed=4).requires_grad_()
    monkeypatch.setattr(torch, "zeros_like", None)  # what the gradient of the weight would be made with
    with torch.no_grad():
        linear_cross_entropy(x, weight, torch.zeros(7, dtype=torch.int64), ROWS)


@pytest.mark.parametrize("tokens", [5, HEAD_CHUNK_TOKENS + 3], ids=["one chunk", "two chunks"])
def test_the_gradient_of_the_weight_is_as_wide_as_its_bucket(tokens: int) -> None:
    """To add a bfloat16 gradient to a float32 one, torch would widen the whole of it, in as much memory again."""
    added: list[torch.dtype] = []

    class Sink:
        def add(self, gradient: torch.Tensor, factor: torch.Tensor) -> None:
            added.append(gradient.dtype)

        def settle(self) -> None:
            """Nothing is being reduced."""

    x, weight = (torch.randn(n, 8, dtype=torch.bfloat16, requires_grad=True) for n in (tokens, 24))
    weight.gradient_sink = Sink()
    linear_cross_entropy(x, weight, torch.arange(tokens) % 20, 20).backward()
    assert added == [torch.float32]

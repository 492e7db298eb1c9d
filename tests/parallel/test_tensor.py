"""A block whose matrices are split over ranks computes what the whole block does, forward and backward."""

import pytest
import torch
from torch import nn

from bagualu.comm.group import Communicator
from bagualu.parallel.tensor import wrap_block
from tests.harness import BACKENDS, run

BATCH, LENGTH, HIDDEN, WIDE = 2, 4, 3, 8


class Block(nn.Module):
    """Two matrices with a nonlinearity between; returns also the sum of its input, as a mixture returns its balance loss."""

    def __init__(self, first: torch.Tensor, second: torch.Tensor, pair: bool) -> None:
        super().__init__()
        self.first, self.second, self.pair = nn.Parameter(first), nn.Parameter(second), pair

    def forward(self, x: torch.Tensor) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        output = torch.tanh(x @ self.first.T) @ self.second.T
        return (output, x.square().sum()) if self.pair else output


def drawn(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def compare(communicator: Communicator, sequence: bool, pair: bool) -> None:
    size, rank = communicator.size, communicator.rank
    first, second = drawn(WIDE, HIDDEN, seed=1), drawn(HIDDEN, WIDE, seed=2)
    x, seed = drawn(BATCH, LENGTH, HIDDEN, seed=3).requires_grad_(), drawn(BATCH, LENGTH, HIDDEN, seed=4)
    whole = Block(first, second, pair)
    output = whole(x)
    expected, extra = output if pair else (output, x.new_zeros(()))
    (expected * seed).sum().add(extra).backward()

    block = Block(first.chunk(size)[rank].clone(), second.chunk(size, dim=1)[rank].clone(), pair)
    wrap_block(block, communicator.world, sequence)
    part = slice(rank * LENGTH // size, (rank + 1) * LENGTH // size) if sequence else slice(None)
    own = x.detach()[:, part].clone().requires_grad_()
    output = block(own)
    found, own_extra = output if pair else (output, own.new_zeros(()))
    if pair:
        torch.testing.assert_close(own_extra, extra, rtol=1e-12, atol=0)  # every rank sees the whole sequence
    torch.testing.assert_close(found, expected[:, part], rtol=1e-12, atol=1e-14)
    (found * seed[:, part]).sum().add(own_extra / size).backward()  # the ranks' shares of it add up to one
    torch.testing.assert_close(own.grad, x.grad[:, part], rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(block.first.grad, whole.first.grad.chunk(size)[rank], rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(block.second.grad, whole.second.grad.chunk(size, dim=1)[rank], rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("pair", [False, True], ids=["tensor", "tuple"])
@pytest.mark.parametrize("sequence", [False, True], ids=["whole", "sequence_parallel"])
@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_split_block_is_the_whole_block(backend: str, size: int, sequence: bool, pair: bool) -> None:
    run(backend, size, compare, sequence, pair)

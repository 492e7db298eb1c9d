"""Dispatch and combine: every row reaches its expert and comes back to its place, however uneven the load."""

import pytest
import torch

from bagualu.comm.group import Communicator
from bagualu.parallel.expert import ExpertParallel, LocalExperts
from tests.harness import BACKENDS, run

EXPERTS, HIDDEN = 4, 3

# rows of each expert, by rank
LOADS = {
    "even": [[2, 2, 2, 2], [2, 2, 2, 2]],
    "skewed": [[5, 0, 1, 2], [0, 0, 7, 1]],
    "all_to_one_expert": [[0, 0, 0, 6], [0, 0, 0, 3]],
    "all_to_one_rank": [[3, 2, 0, 0], [1, 4, 0, 0]],
    "one_rank_sends_nothing": [[0, 0, 0, 0], [1, 2, 3, 4]],
    "nobody_sends_anything": [[0, 0, 0, 0], [0, 0, 0, 0]],
    "four_ranks": [[1, 0, 0, 2], [0, 0, 0, 0], [0, 5, 0, 0], [2, 1, 1, 1]],
}


def there_and_back(communicator: Communicator, loads: list[list[int]]) -> None:
    counts = torch.tensor(loads[communicator.rank])
    owners = torch.repeat_interleave(torch.arange(EXPERTS), counts)
    # A row tells where it is from and for whom: rank, place, expert.
    rows = torch.stack([torch.full((len(owners),), communicator.rank), torch.arange(len(owners)), owners], 1).double()
    rows.requires_grad_()
    exchange = ExpertParallel(communicator.world)
    routed = exchange.dispatch(rows, counts)

    here = EXPERTS // communicator.size
    mine = range(communicator.rank * here, (communicator.rank + 1) * here)
    assert routed.counts == [sum(load[expert] for load in loads) for expert in mine]
    for expert, arrived in zip(mine, routed.rows.split(routed.counts), strict=True):
        assert (arrived[:, 2] == expert).all()
        senders = [rank for rank, load in enumerate(loads) for _ in range(load[expert])]
        assert arrived[:, 0].tolist() == senders  # in the order of the ranks, as on one rank

    factor = 10.0 + torch.repeat_interleave(torch.tensor(list(mine)), torch.tensor(routed.counts)).double().unsqueeze(1)
    back = exchange.combine(routed.rows * factor, routed)
    expected = 10.0 + owners.double().unsqueeze(1)
    assert torch.equal(back, rows * expected)
    seed = torch.arange(back.numel(), dtype=torch.float64).view_as(back)
    back.backward(seed)
    assert torch.equal(rows.grad, seed * expected)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", LOADS)
def test_rows_find_their_expert_and_their_way_back(backend: str, name: str) -> None:
    run(backend, len(LOADS[name]), there_and_back, LOADS[name])


def test_local_experts_move_nothing() -> None:
    rows = torch.randn(6, HIDDEN)
    routed = LocalExperts().dispatch(rows, torch.tensor([1, 0, 5]))
    assert routed.rows is rows
    assert routed.counts == [1, 0, 5]
    assert LocalExperts().combine(rows, routed) is rows

import sys
from pathlib import Path

import pytest
import torch

from bagualu.fault_tolerance.checkpoint.save import save
from bagualu.fault_tolerance.checkpoint.shard import Piece

sys.path.insert(0, str(Path(__file__).parent))

from ranks import run


@pytest.fixture(autouse=True, scope="session")
def _one_thread():
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def run_ranks():
    """run_ranks(size, function(group)) -> what each rank returned or raised."""
    return run


def tensors(step):
    """A small model whose every element tells the step."""
    return {
        "weight/a": torch.arange(24.0).view(6, 4) + 1000 * step,
        "moment/a": torch.full((6, 4), float(step), dtype=torch.float64),
        "count": torch.tensor(step),
        "half/b": torch.full((5,), float(step), dtype=torch.bfloat16),
    }


def rows_of(step, group):
    """This rank's share of it: some rows of each; scalars on the last rank."""
    for name, tensor in tensors(step).items():
        if not tensor.dim():
            if group.rank == group.size - 1:
                yield Piece(name, (), (), tensor)
            continue
        rows = len(tensor)
        begin, end = rows * group.rank // group.size, rows * (group.rank + 1) // group.size
        yield Piece(name, tuple(tensor.shape), (begin, *(0,) * (tensor.dim() - 1)), tensor[begin:end])


@pytest.fixture
def model():
    return tensors


@pytest.fixture
def pieces():
    return rows_of


@pytest.fixture
def save_step():
    """save_step(root, step, size=1, keep=2) -> what each rank returned or raised."""

    def save_all(root, step, size=1, keep=2):
        metadata = {"layout": f"data {size}"}
        return run(size, lambda group: save(root, step, rows_of(step, group), metadata, group, keep))

    return save_all

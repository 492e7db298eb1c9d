import sys
from pathlib import Path

import pytest
import torch

from bagualu.fault_tolerance.checkpoint.saving.fence import EPOCH
from bagualu.fault_tolerance.checkpoint.saving.save import save

sys.path.insert(0, str(Path(__file__).parent))

from ranks import rows_of, run, save_fenced, tensors


@pytest.fixture(autouse=True, scope="session")
def _one_thread():
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def run_ranks():
    """run_ranks(size, function(group)) -> what each rank returned or raised."""
    return run


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


@pytest.fixture
def save_with():
    """save_with(fence, step, size=1, keep=2) -> what each rank returned or raised."""
    return save_fenced


@pytest.fixture
def left():
    """left(root) -> names of what lies there, sorted, but for the fence's."""
    return lambda root: sorted(path.name for path in root.iterdir() if path.name != EPOCH)

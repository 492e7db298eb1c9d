"""Skips what this machine cannot run, and only that: gpu without a GPU, slurm without SLURM. Temporary files lie in memory, and a
test that writes into the folder that it was started in is an error."""

import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import hypothesis
import pytest
import torch

MEMORY = Path("/dev/shm")
ENOUGH_BYTES = 2 * 2**30


def pytest_configure(config: pytest.Config) -> None:
    if not config.option.basetemp and os.access(MEMORY, os.W_OK) and shutil.disk_usage(MEMORY).free > ENOUGH_BYTES:
        # Every save waits for the disk several times over, and a rented disk answers when it likes.
        config.option.basetemp = tempfile.mkdtemp(prefix="bagualu-tests-", dir=MEMORY)
        config.add_cleanup(lambda: shutil.rmtree(config.option.basetemp, ignore_errors=True))
    hypothesis.settings.register_profile("untimed", deadline=None)  # a busy machine is no failure
    hypothesis.settings.load_profile("untimed")
    torch.set_num_threads(1)  # the tensors here are tiny: more threads only wait for each other


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    missing = {
        "gpu": None if torch.cuda.is_available() else "needs an NVIDIA GPU",
        "slurm": None if shutil.which("slurmctld") else "needs SLURM (slurmctld on PATH)",
    }
    for item in items:
        for marker, reason in missing.items():
            if reason and item.get_closest_marker(marker):
                item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(autouse=True)
def _nothing_beside_the_sources() -> Iterator[None]:
    """A path that was meant as a URL, or the other way round, becomes a folder right here, and is committed one day."""
    here, before = Path.cwd(), set(os.listdir())
    yield
    left = set(os.listdir(here)) - before
    left = {name for name in left if not name.startswith(".")}
    assert not left, f"left behind in {here}: {sorted(left)}; write into tmp_path"

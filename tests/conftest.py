"""Skips what this machine cannot run, and only that: gpu without a GPU, slurm without SLURM."""

import shutil

import hypothesis
import pytest
import torch


def pytest_configure() -> None:
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

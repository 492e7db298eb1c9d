"""Skips what this machine cannot run, and only that: gpu without a GPU, slurm without SLURM."""

import shutil

import pytest
import torch


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    missing = {
        "gpu": None if torch.cuda.is_available() else "needs an NVIDIA GPU",
        "slurm": None if shutil.which("slurmctld") else "needs SLURM (slurmctld on PATH)",
    }
    for item in items:
        for marker, reason in missing.items():
            if reason and item.get_closest_marker(marker):
                item.add_marker(pytest.mark.skip(reason=reason))

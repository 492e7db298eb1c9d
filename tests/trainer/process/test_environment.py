"""Threads, cores and allocator of a worker, worked out from the machine and the recipe."""

import os

import pytest

from bagualu.trainer.process import environment
from bagualu.trainer.recipe.config import LaunchConfig


@pytest.fixture
def four_cores(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {5, 4, 3, 2}, raising=False)
    monkeypatch.setattr(environment, "QUOTA", environment.QUOTA / "none")
    pinned = []
    monkeypatch.setattr(os, "sched_setaffinity", lambda pid, cores: pinned.append(cores), raising=False)
    for name in ("GLIBC_TUNABLES", environment.CUBLAS):
        monkeypatch.delenv(name, raising=False)
    return pinned


def test_cores_are_shared_out_evenly_and_never_fewer_than_one_thread(four_cores):
    assert [environment.threads(LaunchConfig(), workers) for workers in (1, 2, 3, 8)] == [4, 2, 1, 1]
    assert environment.threads(LaunchConfig(threads=3), 8) == 3


def test_each_worker_is_pinned_to_cores_of_its_own(four_cores):
    for local_rank in range(2):
        environment.pin(LaunchConfig(), local_rank, 2)
    assert four_cores == [[2, 3], [4, 5]]


def test_nobody_is_pinned_when_workers_outnumber_cores_or_it_is_off(four_cores):
    environment.pin(LaunchConfig(), 0, 8)
    environment.pin(LaunchConfig(affinity=False), 0, 2)
    assert four_cores == []


def test_the_allocator_keeps_what_a_person_has_set(four_cores, monkeypatch):
    monkeypatch.setenv("GLIBC_TUNABLES", "glibc.malloc.hugetlb=2")
    tunables = environment.variables(LaunchConfig(), 2)["GLIBC_TUNABLES"].split(":")
    assert "glibc.malloc.hugetlb=2" in tunables
    assert "glibc.malloc.hugetlb=1" not in tunables
    assert any(entry.startswith("glibc.malloc.trim_threshold=") for entry in tunables)


def test_the_system_allocator_is_left_alone(four_cores):
    assert environment.variables(LaunchConfig(allocator="system"), 2) == {
        "OMP_NUM_THREADS": "2", "MKL_NUM_THREADS": "2", "CUBLAS_WORKSPACE_CONFIG": ":4096:8", "TORCH_CPP_LOG_LEVEL": "ERROR",
    }  # fmt: skip


@pytest.mark.parametrize(("given", "wanted"), [(":16:8", None), (":4096:8", None), (":4096:2:16:8", ":4096:8"), ("", ":4096:8")])
def test_matrix_products_of_a_gpu_get_a_workspace_with_which_they_repeat(four_cores, monkeypatch, given, wanted):
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", given)
    assert environment.variables(LaunchConfig(), 2).get("CUBLAS_WORKSPACE_CONFIG") == wanted


def test_a_container_quota_limits_the_cores_and_nobody_is_pinned_then(four_cores, tmp_path, monkeypatch):
    quota = tmp_path / "cpu.max"
    monkeypatch.setattr(environment, "QUOTA", quota)
    for text, expected in (("200000 100000", 2), ("max 100000", 4), ("50000 100000", 1), ("800000 100000", 4)):
        quota.write_text(text)
        assert environment.cores() == expected
        environment.pin(LaunchConfig(), 0, 1)
        assert (four_cores == [[2, 3, 4, 5]]) == (expected == 4)
        four_cores.clear()

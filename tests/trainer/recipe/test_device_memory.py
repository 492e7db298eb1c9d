"""The memory that a process may use: the machine's, or what a control group of either version leaves of it."""

import os
from pathlib import Path

from bagualu.trainer.recipe.device_memory import cpu_bytes

MACHINE = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def group(folder: Path, name: str, limit: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text(limit + "\n")


def test_without_control_groups_it_is_the_machines(tmp_path: Path) -> None:
    assert cpu_bytes(tmp_path / "cgroup", tmp_path) == MACHINE
    (tmp_path / "cgroup").write_text("0::/none\n")
    assert cpu_bytes(tmp_path / "cgroup", tmp_path) == MACHINE


def test_the_lowest_limit_on_the_way_up_counts_in_version_2(tmp_path: Path) -> None:
    (tmp_path / "cgroup").write_text("0::/job.slice/step\n")
    group(tmp_path / "job.slice/step", "memory.max", "max")
    assert cpu_bytes(tmp_path / "cgroup", tmp_path) == MACHINE
    group(tmp_path / "job.slice", "memory.max", "1000000")
    assert cpu_bytes(tmp_path / "cgroup", tmp_path) == 1000000
    group(tmp_path / "job.slice/step", "memory.max", "900000")
    assert cpu_bytes(tmp_path / "cgroup", tmp_path) == 900000


def test_a_container_sees_its_own_group_at_the_root(tmp_path: Path) -> None:
    (tmp_path / "cgroup").write_text("0::/docker/0123\n")
    group(tmp_path, "memory.max", "700000")
    assert cpu_bytes(tmp_path / "cgroup", tmp_path) == 700000


def test_version_1_has_a_folder_for_memory_and_a_huge_number_for_no_limit(tmp_path: Path) -> None:
    (tmp_path / "cgroup").write_text("9:name=systemd:/\n4:memory:/job\n1:cpu,cpuacct:/other\n0::/\n")
    group(tmp_path / "memory", "memory.limit_in_bytes", "9223372036854771712")
    assert cpu_bytes(tmp_path / "cgroup", tmp_path) == MACHINE
    group(tmp_path / "memory/job", "memory.limit_in_bytes", "800000")
    assert cpu_bytes(tmp_path / "cgroup", tmp_path) == 800000


def test_here_it_is_no_more_than_the_machine_has() -> None:
    assert 0 < cpu_bytes() <= MACHINE

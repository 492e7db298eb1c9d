"""What is wrong is said with what to do, and nothing is said of what is not wrong."""

from dataclasses import replace
from typing import Any

import pytest

from bagualu.launch.machine.disk import DiskFigures
from bagualu.launch.machine.facts import Facts
from bagualu.launch.machine.figures import ProductTime, RankFigures
from bagualu.launch.machine.problems import problems
from tests.launch.machine.test_figures import ONE

GOOD = Facts("Some CPU", 8, [], 10**11, 0, None, False, 10**10, 0.1, "3.11", "Linux", {"torch": "2.13.0+cpu"})
DISK = DiskFigures("/runs", 1e9, 1e9, 0.01, 10**12)
BACKENDS = {"gloo": "works", "nccl": "no NVIDIA GPU here", "simulated": "works"}
WIDE = ProductTime("float32", 512, 64, 64, 1e-5)


def told(
    facts: Facts = GOOD,
    backends: dict[str, str] | None = None,
    disk: DiskFigures | None = DISK,
    measured: RankFigures = ONE,
    error: str = "",
) -> list[str]:
    return [str(problem) for problem in problems(facts, backends or BACKENDS, disk, [measured], error)]


def test_a_good_machine_has_no_problems() -> None:
    assert told() == []


@pytest.mark.parametrize(
    ("changed", "what", "fix"),
    [
        ({"facts": replace(GOOD, gpus=2)}, "2 NVIDIA GPUs here, but the installed torch 2.13.0+cpu is", "pytorch.org"),
        ({"backends": BACKENDS | {"gloo": "CommunicationError: no"}}, "comm.backend=gloo does not work here: Comm", "loopback"),
        ({"backends": BACKENDS | {"hccl": "it sums wrongly"}}, "comm.backend=hccl does not work here", "its package"),
        ({"facts": replace(GOOD, gpus=1, torch_has_cuda=True), "backends": {"nccl": "failed"}}, "comm.backend=nccl", "NCCL_DEBUG"),
        ({"facts": replace(GOOD, shared_memory_bytes=2**26)}, "only 64 MiB are free in /dev/shm", "--shm-size"),
        ({"facts": replace(GOOD, shared_memory_bytes=None)}, "there is no /dev/shm", "tmpfs"),
        ({"disk": None, "error": "Permission denied: /runs"}, "runs cannot be written: Permission denied: /runs", "run.dir="),
        ({"disk": replace(DISK, free_bytes=10**9)}, "only 1.0 GB are free in /runs", "make room"),
        ({"disk": replace(DISK, write_bytes_per_second=2e7)}, "/runs writes only 20 MB/s, so that a checkpoint", "faster"),
        ({"facts": replace(GOOD, load=6.0)}, "other programs used this machine", "idle"),
        ({"measured": replace(ONE, spread=0.6)}, "60% apart", "idle"),
        ({"measured": replace(ONE, products=[*ONE.products, WIDE])}, "bfloat16 more slowly", "train.dtype=float32"),
    ],
)  # fmt: skip
def test_a_problem_is_said_with_its_fix(changed: dict[str, Any], what: str, fix: str) -> None:
    (problem,) = told(**changed)
    assert what in problem
    assert fix in problem.partition("; ")[2]

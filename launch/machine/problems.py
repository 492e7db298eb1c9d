"""What is wrong with a machine, and what to do about it: conclusions from what was seen and measured. Pure functions."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from bagualu.launch.machine.disk import DiskFigures
from bagualu.launch.machine.facts import Facts
from bagualu.launch.machine.figures import RankFigures

_LEAST_SHARED_BYTES = 256 * 2**20
_LEAST_FREE_BYTES = 10 * 10**9
_SLOW_DISK = 100e6
"""Bytes per second, of writing."""
_MOST_SPREAD = 0.3


@dataclass(frozen=True)
class MachineProblem:
    what: str
    fix: str

    def __str__(self) -> str:
        return f"{self.what}; {self.fix}"


def problems(
    facts: Facts, backends: Mapping[str, str], disk: DiskFigures | None, measured: Sequence[RankFigures], disk_error: str = ""
) -> list[MachineProblem]:
    """Returns the problems, the worst first. `backends`: for each backend "works", or why it does not; `disk_error`: why the file
    system could not be measured, if it could not."""
    return [*_of_devices(facts, measured), *_of_backends(facts, backends), *_of_memory(facts), *_of_disk(disk, disk_error),
            *_of_measuring(facts, measured)]  # fmt: skip


def _of_devices(facts: Facts, measured: Sequence[RankFigures]) -> Iterator[MachineProblem]:
    if facts.gpus and not facts.torch_has_cuda:
        gpus, torch = f"{facts.gpus} NVIDIA GPU{'s' * (facts.gpus > 1)}", facts.versions.get("torch")
        yield MachineProblem(f"{gpus} here, but the installed torch {torch} is built without CUDA, so runs use the CPU",
                      "install torch from the index of its CUDA builds (https://pytorch.org/get-started)")  # fmt: skip
    for one in measured[:1]:
        peaks = one.peaks()
        if one.device == "cpu" and peaks.get("bfloat16", 0.0) < peaks.get("float32", 0.0):
            yield MachineProblem("this CPU multiplies bfloat16 more slowly than float32", "give train.dtype=float32")


def _of_backends(facts: Facts, backends: Mapping[str, str]) -> Iterator[MachineProblem]:
    for name, state in backends.items():
        no_gpu = name == "nccl" and not (facts.gpus and facts.torch_has_cuda)  # nothing is wrong, or it has been said
        if state != "works" and not no_gpu:
            fix = _FIXES.get(name, "see whether its package fits this torch and this machine")
            yield MachineProblem(f"comm.backend={name} does not work here: {state}", fix)


_FIXES = {
    "gloo": "see whether the loopback interface is up (ip link show lo) and a firewall lets this machine talk to itself",
    "nccl": "run with NCCL_DEBUG=INFO, which says what it misses; comm.backend=gloo uses the CPU",
}


def _of_memory(facts: Facts) -> Iterator[MachineProblem]:
    free = facts.shared_memory_bytes
    if free is None:
        yield MachineProblem("there is no /dev/shm", "mount a tmpfs there: ranks share memory in it")
    elif free < _LEAST_SHARED_BYTES:
        yield MachineProblem(f"only {free / 2**20:.0f} MiB are free in /dev/shm, which NCCL and the launcher need",
                      "remove what was left there, or give the container more (docker run --shm-size=8g)")  # fmt: skip


def _of_disk(disk: DiskFigures | None, error: str) -> Iterator[MachineProblem]:
    if disk is None:
        yield MachineProblem(f"runs cannot be written: {error}", "give run.dir=DIR on a file system that can be written")
        return
    if disk.free_bytes < _LEAST_FREE_BYTES:
        yield MachineProblem(f"only {disk.free_bytes / 1e9:.1f} GB are free in {disk.path}, where runs keep checkpoints",
                      "make room, or give another run.dir")  # fmt: skip
    if (rate := disk.write_bytes_per_second) < _SLOW_DISK:
        slow = f"{disk.path} writes only {rate / 1e6:.0f} MB/s, so that a checkpoint of 1 GB takes {1e9 / rate:.0f} s"
        yield MachineProblem(slow, "give run.dir=DIR on a faster disk, or raise checkpoint.every")


def _of_measuring(facts: Facts, measured: Sequence[RankFigures]) -> Iterator[MachineProblem]:
    spread = max((one.spread for one in measured), default=0.0)
    if facts.load > facts.cores / 2 or spread > _MOST_SPREAD:
        busy = f"load {facts.load:.1f} on {facts.cores} cores, times of the same product {spread:.0%} apart"
        yield MachineProblem(f"other programs used this machine while it was measured ({busy}), so the figures may be too low",
                             "run bagualu doctor again when it is idle")  # fmt: skip

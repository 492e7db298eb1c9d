"""Four ranks on two machines (network namespaces), three here and rank 3 there; then the link between them is cut. Run as a script.

    unshare -rn python -m tests.fault_tolerance.watchdog.cut_link FOLDER both|one_way

Not collected by pytest. Prints the failure that the watchdog found, as JSON. Everything is gone with its processes.
"""

import json
import multiprocessing
import os
import subprocess
import sys
import time
from dataclasses import asdict
from multiprocessing.context import ForkProcess
from pathlib import Path
from typing import Any

import torch

from bagualu.comm.group import Communicator
from bagualu.comm.monitor import Phase
from bagualu.comm.world import World
from bagualu.launch.watch.hang import HangCheck
from bagualu.trainer.process.stop_request import StopRequest
from bagualu.trainer.process.worker import work
from bagualu.trainer.recipe.compose import compose
from bagualu.trainer.recipe.config import Recipe
from tests.namespaces import join_network

_RANKS, _PORT = 4, 29511


def main(folder: Path, how: str) -> None:
    there = subprocess.Popen(["unshare", "-n", "sleep", "1000"])
    workers: list[ForkProcess] = []
    try:
        _connect(there.pid)
        for rank in range(_RANKS):
            workers.append(_start(folder, rank, there.pid))
        _wait_for_steps(folder, workers, 5)
        last = max(_steps(folder)) + 50  # a second ahead: all see it in time
        (folder / "new").write_text(str(last))
        (folder / "new").rename(folder / "last")
        _wait_for_steps(folder, workers, last)  # nothing is under way when the link goes: then all send into the cut
        recipe = compose([f"run.dir={folder}", "restart.hang_seconds=4", "restart.long_hang_seconds=60"])
        check = HangCheck(recipe, folder)
        check.started(0, {rank: worker.pid or 0 for rank, worker in enumerate(workers)})
        if how == "both":
            _do("ip link set left down")
        else:  # what goes there is sent to a machine that does not exist; what comes from there still arrives
            _do("ip neigh replace 10.77.0.2 lladdr 02:00:00:00:00:99 dev left nud permanent")
        (folder / "last").unlink()
        deadline = time.monotonic() + 90
        while not (failure := check.look()):
            assert time.monotonic() < deadline, "not found"
            time.sleep(0.1)
        print(json.dumps(asdict(failure)))
    finally:
        for process in [*workers, there]:
            process.kill()
        for worker in workers:
            worker.join()
        there.wait()


def _connect(there: int) -> None:
    while os.readlink(f"/proc/{there}/ns/net") == os.readlink("/proc/self/ns/net"):
        time.sleep(0.01)
    _do("ip link set lo up")
    _do("ip link add left type veth peer name right")
    _do(f"ip link set right netns {there}")
    _do("ip addr add 10.77.0.1/24 dev left")
    _do("ip link set left up")
    for command in ("ip link set lo up", "ip addr add 10.77.0.2/24 dev right", "ip link set right up"):
        _do(f"nsenter -t {there} -n {command}")


def _start(folder: Path, rank: int, there: int) -> ForkProcess:
    """A process that has imported torch already."""
    worker = multiprocessing.get_context("fork").Process(target=_work, args=(folder, rank, there))
    worker.start()
    return worker


def _work(folder: Path, rank: int, there: int) -> None:
    far = rank == _RANKS - 1
    if far:
        join_network(there)
    world = {"RANK": rank, "WORLD_SIZE": _RANKS, "LOCAL_RANK": rank, "MASTER_ADDR": "10.77.0.1", "MASTER_PORT": _PORT}
    os.environ.update({name: str(value) for name, value in world.items()}, GLOO_SOCKET_IFNAME="right" if far else "left")
    recipe = compose([f"run.dir={folder}", "train.steps=100000", "comm.backend=gloo"])
    work(recipe, World.from_environment(), StopRequest(), print, "tests.fault_tolerance.watchdog.cut_link:train", folder)


def train(recipe: Recipe, communicator: Communicator, stop: Any, scratch: Path | None = None) -> dict[str, Any]:
    """What the ranks run: steps of one collective of all."""
    last = Path(recipe.run.dir) / "last"
    while True:
        while _reads(last) == str(communicator.monitor.step):
            time.sleep(0.01)
        communicator.monitor.step += 1
        communicator.monitor.at(Phase.DATA)
        time.sleep(0.02)
        communicator.world.all_reduce(torch.ones(1000))
        (Path(recipe.run.dir) / f"step-{communicator.rank}").write_text(str(communicator.monitor.step))


def _wait_for_steps(folder: Path, workers: list[ForkProcess], steps: int) -> None:
    deadline = time.monotonic() + 120
    while min(_steps(folder)) < steps:
        assert all(worker.is_alive() for worker in workers), "a rank has died"
        assert time.monotonic() < deadline, "the ranks did not come up"
        time.sleep(0.05)


def _reads(file: Path) -> str:
    try:
        return file.read_text()
    except FileNotFoundError:
        return ""


def _steps(folder: Path) -> list[int]:
    """How many each rank has done."""
    files = [folder / f"step-{rank}" for rank in range(_RANKS)]
    return [int(file.read_text() or 0) if file.exists() else 0 for file in files]


def _do(command: str) -> None:
    subprocess.run(command.split(), check=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])

"""Four ranks on four machines, behind a network that misbehaves from their sixth step on. Run as a script.

    unshare -rn python -m tests.comm.behind_wire FOLDER

Not collected by pytest. Each kind of weather has machines of its own, all at the same time, because they mostly wait. Leaves in
FOLDER/WEATHER.json how many frames were touched and what every rank did: steps whose results were all right, and why it ended.
"""

import json
import mmap
import os
import select
import signal
import sys
import time
import traceback
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch

from bagualu.comm.errors import CommunicationError
from bagualu.comm.group import Group, connect
from bagualu.comm.world import World
from tests.namespaces import own_network
from tests.wire import Weather, Wire

RANKS, STEPS, FAIR_STEPS = 4, 15, 5
_SOON_SECONDS, _LATE_SECONDS = 5.0, 60.0
"""Timeouts of collectives: where they are to fail, and where they are not, however busy this machine is."""
_EVERYWHERE = {(one, other) for one in range(RANKS) for other in range(RANKS)}
_FROM_2 = {(2, other) for other in range(RANKS)}
WEATHERS = {
    "delay": Weather(delay_seconds=0.01),
    "loss": Weather(loss=0.03),
    "garble": Weather(garble=0.03),
    "gap": Weather(cut=_EVERYWHERE),  # for half a second
    "reset": Weather(reset=True),
    "dead": Weather(cut=_EVERYWHERE),
    "one_way": Weather(cut=_FROM_2),
}
_GAP_SECONDS = 0.5
_LOST = ("reset", "dead", "one_way")


def exchange(world: Group, pair: Group, step: int) -> None:
    """Every way to communicate that a run has, each checked to the bit."""
    rank, size = world.rank, world.size
    values = torch.arange(size * 1000, dtype=torch.float64).reshape(size, -1) + step
    expected = size * values + sum(range(size))
    total, mine, whole = values + rank, torch.empty(1000, dtype=torch.float64), torch.empty_like(values)
    world.all_reduce(total)
    _same(total, expected, "sum")
    world.reduce_scatter(mine, values + rank)
    _same(mine, expected[rank], "part of the sum")
    world.all_gather(whole, mine)
    _same(whole, expected, "whole")
    total = values + rank
    pair.all_reduce(total)
    _same(total, 2 * values + sum(pair.ranks), "sum of two")
    world.all_to_all(whole, values + rank)
    _same(whole, values[rank].expand_as(whole) + torch.arange(size)[:, None], "exchange")
    given = values + rank
    world.broadcast(given, step % size)
    _same(given, values + step % size, "broadcast")


def _same(found: torch.Tensor, expected: torch.Tensor, what: str) -> None:
    if not torch.equal(found, expected):
        raise AssertionError(f"a wrong {what}, and no word of it")


def live(rank: int, steps: memoryview, meeting: str, timeout_seconds: float) -> str:
    """One rank's life; why it ended, "" when nothing went wrong."""
    torch.set_num_threads(1)
    communicator = connect("gloo", World(rank, RANKS, rank, meeting), timeout_seconds)
    pair = communicator.group((rank & ~1, rank | 1), "pair")
    try:
        for step in range(STEPS):
            exchange(communicator.world, pair, step)
            steps[rank] = step + 1
    except CommunicationError as error:
        return str(error)
    return ""


def fork(rank: int, life: Callable[[], str], folder: Path) -> tuple[int, int]:
    """A process with a network of its own that waits to be told to begin: its id, and the pipe to tell it by."""
    seen, told, begin, tell = *os.pipe(), *os.pipe()
    if pid := os.fork():
        os.read(seen, 1)
        return pid, tell
    try:
        own_network()
        os.write(told, b"1")
        os.read(begin, 1)
        os.environ["GLOO_SOCKET_IFNAME"] = "eth0"
        (folder / f"why-{rank}").write_text(life())
    except BaseException:
        (folder / f"why-{rank}").write_text(traceback.format_exc())
    os._exit(0)


def run(name: str, folder: Path) -> None:
    """Four ranks in that weather."""
    folder.mkdir()
    own_network()
    steps = memoryview(mmap.mmap(-1, RANKS))
    meeting, patience = (folder / "store").as_uri(), _SOON_SECONDS if name in _LOST else _LATE_SECONDS
    ranks = [fork(rank, partial(live, rank, steps, meeting, patience), folder) for rank in range(RANKS)]
    alive = {os.pidfd_open(pid): pid for pid, _ in ranks}

    def all_ended() -> bool:
        for one in select.select(list(alive), [], [], 0)[0]:
            os.waitpid(alive.pop(one), 0)
        return not alive

    try:
        with Wire([pid for pid, _ in ranks]) as wire:
            for _, tell in ranks:
                os.write(tell, b"1")
            wire.carry(lambda: all_ended() or min(steps) >= FAIR_STEPS)
            wire.weather = WEATHERS[name]
            if name == "gap":
                until = time.monotonic() + _GAP_SECONDS
                wire.carry(lambda: time.monotonic() > until)
                wire.weather = Weather()
            wire.carry(all_ended)
    finally:
        for pid in alive.values():
            os.kill(pid, signal.SIGKILL)
    did = {"touched": wire.touched, "steps": list(steps), "why": [(folder / f"why-{rank}").read_text() for rank in range(RANKS)]}
    folder.with_suffix(".json").write_text(json.dumps(did))


def main(folder: Path) -> int:
    """0 when every weather has been lived through, well or not."""
    networks = []
    for name in WEATHERS:
        if pid := os.fork():
            networks.append(pid)
            continue
        code = 1
        try:
            run(name, folder / name)
            code = 0
        except BaseException:
            traceback.print_exc()
        os._exit(code)
    return max(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in networks)


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))

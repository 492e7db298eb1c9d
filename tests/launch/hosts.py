"""A run on three machines, one of which dies. Run as a script; not collected by pytest.

    unshare -rn python -m tests.launch.hosts FOLDER CASE WORD...

Each machine is a network namespace with an agent and one worker; machine 0 has the store where the agents meet. A case is
MACHINE-WHEN-HOW:

    training     in the middle of the run
    joining      one of the others has come to the store, and the third not yet
    meeting      the agents know of each other, and tell each other how many workers they have
    connecting   the workers of the others are there and wait for those of this machine
    all          every process of the machine is killed with SIGKILL
    agent        the agent alone
    power        all, and nobody is told: no connection is closed
    worker       the worker alone
    back         like all, and the machine is there again a moment later
    late         nothing is killed: the machine is only slower than an agent may be silent

When the others have ended, the run is resumed on one of them alone, to its end. Leaves in FOLDER the run and what the agents said
(agent-MACHINE), prints one JSON object.
"""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch.distributed.elastic.agent.server.api import SimpleElasticAgent

from bagualu.comm.group import Communicator
from bagualu.launch.workers.rendezvous import SILENT_SECONDS
from bagualu.trainer.process import worker
from bagualu.trainer.recipe.config import Recipe
from tests.launch import faulty
from tests.launch.survival import SMALL
from tests.launch.together import FOLDER, MACHINE, have_come, tell_them_to_meet
from tests.namespaces import join_network, own_network
from tests.wire import Weather, Wire, address

MACHINES = 3
GO_ON = ("back", "worker", "late")
"""After these the run needs no help."""
_PORT = 29500
_AGENT = "import sys; from tests.launch import hosts, together; sys.exit(together.agent(sys.argv[1:], 'tests.launch.hosts:train'))"
_ESTABLISHED = "01"


def train(recipe: Recipe, communicator: Communicator, stop: Any, scratch: Path | None = None) -> dict[str, Any]:
    """What the ranks run."""
    return faulty.train(recipe, communicator, stop, scratch)


def _held(when: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """`function`, before which a process waits for its end on the machine that a file FOLDER/WHEN-MACHINE names."""

    def held(*arguments: Any, **options: Any) -> Any:
        place = Path(os.environ[FOLDER]) / f"{when}-{os.environ[MACHINE]}"
        if place.exists():
            place.with_name(f"{place.name}-held").touch()
            while place.exists():
                time.sleep(0.01)
        return function(*arguments, **options)

    return held


if MACHINE in os.environ:  # an agent, or the server that workers are forked from
    worker.connect = _held("connecting", worker.connect)
    SimpleElasticAgent._assign_worker_ranks = _held("meeting", SimpleElasticAgent._assign_worker_ranks)  # type: ignore[method-assign]


class Machine:
    """A namespace that lives until the end of the script, and the agents that are started in it."""

    def __init__(self, number: int, folder: Path, words: list[str]) -> None:
        self.number, self.folder, self.words = number, folder, words
        self.holder = subprocess.Popen(["cat"], stdin=subprocess.PIPE, preexec_fn=own_network)
        self.agents: list[subprocess.Popen[bytes]] = []
        self.ended: float | None = None

    def start(self, nodes: int = MACHINES, store: int = 0) -> None:
        command = [sys.executable, "-c", _AGENT, "--meet", f"{address(store)}:{_PORT}", "--id", "test", *SMALL, *self.words,
                   f"launch.nodes={nodes}", f"launch.workers={MACHINES // nodes}"]  # fmt: skip
        environment = {**os.environ, MACHINE: str(self.number), FOLDER: str(self.folder), "GLOO_SOCKET_IFNAME": "eth0"}
        self.agents.append(subprocess.Popen(
            command, start_new_session=True, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
            stderr=(self.folder / f"agent-{self.number}").open("a"), env=environment,
            preexec_fn=lambda: join_network(self.holder.pid),
        ))  # fmt: skip
        self.ended = None

    def processes(self) -> list[int]:
        """All that an agent has started here, itself too."""
        mark, found = f"{MACHINE}={self.number}".encode(), []
        for path in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                if mark in (path / "environ").read_bytes().split(b"\0"):
                    found.append(int(path.name))
        return found

    def workers(self) -> list[int]:
        """Processes that the fork server has forked."""
        return [pid for pid in self.processes() if pid != self.agents[-1].pid and b"forkserver" in _command(_parent(pid))]

    def kill(self, how: str) -> None:
        whom = {"agent": lambda: [self.agents[-1].pid], "worker": self.workers}.get(how, self.processes)
        for pid in whom():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def alive(self) -> bool:
        if self.ended is None and self.agents and self.agents[-1].poll() is not None:
            self.ended = time.monotonic()
        return bool(self.agents) and self.ended is None

    def at_the_store(self) -> bool:
        """Whether a connection of this machine to the store stands."""
        tables = [Path(f"/proc/{self.holder.pid}/net/{name}").read_text() for name in ("tcp", "tcp6")]
        lines = [line.split() for table in tables for line in table.splitlines()[1:]]
        return any(line[2].endswith(f":{_PORT:04X}") and line[3] == _ESTABLISHED for line in lines)


def _command(pid: int) -> bytes:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return b""


def _parent(pid: int) -> int:
    try:
        return int(Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[1])
    except OSError:
        return 0


def main(folder: Path, case: str, words: list[str]) -> None:
    number, when, how = case.split("-")
    run = folder / "run"
    run.mkdir()
    (run / "slow").touch()
    words = ["checkpoint.resume=true", "run.name=slow", f"run.dir={run}", *words]
    machines = [Machine(each, folder, words) for each in range(MACHINES)]
    try:
        with Wire([machine.holder.pid for machine in machines]) as wire:
            told = _die(wire, machines, machines[int(number)], when, how, folder)
            (run / "slow").unlink()
            if how not in GO_ON:
                wire.carry(lambda: not any(machine.processes() for machine in machines), 20)
                one = machines[1]
                one.start(nodes=1, store=one.number)
            wire.carry(lambda: not any(machine.alive() for machine in machines), 90)
            told["resumed"] = [machine.agents[-1].returncode for machine in machines if machine.agents]
    finally:
        for machine in machines:
            machine.kill("all")
            machine.holder.kill()
    print(json.dumps(told))


def _die(wire: Wire, machines: list[Machine], victim: Machine, when: str, how: str, folder: Path) -> dict[str, Any]:
    """Start the machines, let one die; the exit codes of the others and the seconds until they had ended or gone on."""
    run, others = folder / "run", [machine for machine in machines if machine is not victim]
    if when in ("meeting", "connecting"):
        (folder / f"{when}-{victim.number}").touch()
    first = machines[:2] if when == "joining" else machines
    for machine in first:
        machine.start()
    wire.carry(lambda: have_come(folder, len(first)))
    tell_them_to_meet(folder)
    if when == "training":
        wire.carry(lambda: _steps(run) >= 4 or not all(machine.alive() for machine in machines))
    elif when == "joining":
        other = first[1 - victim.number]
        wire.carry(lambda: other.at_the_store() or not other.alive())
    else:
        wire.carry((folder / f"{when}-{victim.number}-held").exists)
    until = time.monotonic() + (0 if when == "training" else 2)  # for the others to begin to wait
    wire.carry(lambda: time.monotonic() > until)
    if how == "power":
        wire.weather = Weather(cut={(a, b) for a in range(MACHINES) for b in range(MACHINES) if victim.number in (a, b)})
    before, began = _steps(run), time.monotonic()
    if how == "late":
        wire.carry(lambda: time.monotonic() > began + 2 * SILENT_SECONDS)
    else:
        victim.kill(how)
    if when in ("meeting", "connecting"):
        (folder / f"{when}-{victim.number}").unlink()
    if how == "back":
        wire.carry(lambda: not victim.alive())
        victim.start()
    if how in GO_ON:
        wire.carry(lambda: _steps(run) > before + 1 or not any(machine.alive() for machine in machines), 90)
    else:
        wire.carry(lambda: not any(machine.alive() for machine in others) and not victim.alive(), 90)
    ended = max(machine.ended or time.monotonic() for machine in others if machine.agents)
    wire.weather = Weather()
    return {"seconds": ended - began, "codes": [machine.agents[-1].poll() for machine in others if machine.agents]}


def _steps(run: Path) -> int:
    metrics = run / "metrics.jsonl"
    return len(metrics.read_text().splitlines()) if metrics.exists() else 0


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], sys.argv[3:])

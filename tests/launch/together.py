"""Agents of several machines that begin to meet at the same time: one that has waited too long for the others begins alone.

A machine is a network namespace (tests/namespaces.py).
"""

import os
import subprocess
import time
from pathlib import Path

from bagualu.launch import node
from tests.launch.warm import Forked

FOLDER, MACHINE = "MACHINES_FOLDER", "MACHINES_NUMBER"
"""Variables of an agent's environment."""


def agent(arguments: list[str], entrypoint: str) -> int:
    """What runs on a machine: says that it is there, and meets the others once it is told to."""
    folder = Path(os.environ[FOLDER])
    (folder / f"ready-{os.environ[MACHINE]}").touch()
    while not (folder / "go").exists():
        time.sleep(0.05)
    return node.main(arguments, entrypoint)


def start_agent(module: str, machine: int, network: int, folder: Path, words: list[str]) -> Forked:
    """`agent(words)` of `module` on the machine that process `network` is on; what it says goes to FOLDER/agent-MACHINE."""
    program = f"import sys; from tests.namespaces import join_network; join_network({network}); "
    program += f"from {module} import agent; sys.exit(agent(sys.argv[1:]))"
    environment = {**os.environ, MACHINE: str(machine), FOLDER: str(folder), "GLOO_SOCKET_IFNAME": "eth0"}
    with (folder / f"agent-{machine}").open("a") as said:
        return Forked(program, words, cwd=Path.cwd(), env=environment, stdout=subprocess.DEVNULL, stderr=said)


def have_come(folder: Path, machines: int) -> bool:
    """Whether the agents of so many machines are there."""
    return len(list(folder.glob("ready-*"))) >= machines


def tell_them_to_meet(folder: Path) -> None:
    (folder / "go").touch()

"""Agents of several machines that begin to meet at the same time: one that has waited too long for the others begins alone."""

import os
import time
from pathlib import Path

from bagualu.launch import node

FOLDER, MACHINE = "MACHINES_FOLDER", "MACHINES_NUMBER"
"""Variables of an agent's environment."""


def agent(arguments: list[str], entrypoint: str) -> int:
    """What runs on a machine: says that it is there, and meets the others once it is told to."""
    folder = Path(os.environ[FOLDER])
    (folder / f"ready-{os.environ[MACHINE]}").touch()
    while not (folder / "go").exists():
        time.sleep(0.05)
    return node.main(arguments, entrypoint)


def have_come(folder: Path, machines: int) -> bool:
    """Whether the agents of so many machines are there."""
    return len(list(folder.glob("ready-*"))) >= machines


def tell_them_to_meet(folder: Path) -> None:
    (folder / "go").touch()

"""One rank's place among the nodes, and the folder in memory that its node's ranks share.

scratch/replicas/.node              which node this is
                 .session           the newest start of the run that this node has taken part in
                 step-00000010/     parts of one save; manifest.json where they have been gathered after a restart
                 .saving-*          parts of a save that is under way, or never came to its end
"""

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import psutil
import torch

from bagualu.comm.group import Group
from bagualu.fault_tolerance.checkpoint.agree import on_all
from bagualu.fault_tolerance.checkpoint.directory import clear_stale, discard, list_checkpoints
from bagualu.fault_tolerance.checkpoint.exchange import gather_json
from bagualu.fault_tolerance.checkpoint.format import step_of
from bagualu.fault_tolerance.replica.nodes import Nodes, node_token

T = TypeVar("T")
_SESSION = ".session"


@dataclass(frozen=True)
class Site:
    """`run` says whose replicas these are; `session` tells this start of the run from all others and sorts after earlier ones."""

    root: Path
    nodes: Nodes
    group: Group
    device: torch.device
    run: str
    session: str
    stale: bool
    """This node has missed the newest session of any node here: of what it holds, only what the others hold too still counts."""

    @property
    def leads(self) -> bool:
        """Whether this rank acts for its node."""
        return self.nodes.leads(self.group.rank)

    @property
    def beside(self) -> tuple[int, ...]:
        """Positions on this node."""
        return self.nodes.beside(self.group.rank)

    def on_all(self, function: Callable[[], T]) -> T:
        """`function()`, once it has worked on all ranks. Collective. Raises CheckpointError on every rank when it failed on any."""
        return on_all(function, self.group, self.device)

    def begin(self) -> None:
        """This node takes part in the session from now on. Raises OSError."""
        if self.leads:
            unfinished = self.root / f"{_SESSION}-new"
            unfinished.write_text(json.dumps({"run": self.run, "session": self.session}))
            unfinished.replace(self.root / _SESSION)

    def forget(self, keep: int = 0, after: int = -1) -> None:
        """Let go of all but the newest `keep`, and of those of steps later than `after` if given. Raises CheckpointError."""
        if self.leads:
            held = list_checkpoints(self.root)
            later = [path for path in held if after >= 0 and (step_of(path) or 0) > after]
            earlier = [path for path in held if path not in later]
            for path in [*later, *earlier[: len(earlier) - keep]]:
                discard(path)

    def free_bytes(self) -> int:
        """Memory that replicas on this node can take, what they take now included."""
        taken = sum(file.stat().st_size for file in self.root.rglob("*") if file.is_file())
        return min(shutil.disk_usage(self.root).free, psutil.virtual_memory().available) + taken


def open_site(scratch: Path, run: str, session: str, group: Group, device: torch.device) -> Site:
    """Find out who shares a node with whom, and clear away what is of no use. Collective. Raises OSError."""
    root = scratch / "replicas"
    root.mkdir(parents=True, exist_ok=True)
    told = gather_json({"node": node_token(root), "session": _session(root, run)}, group, device)
    nodes = Nodes.by_token([one["node"] for one in told])
    sessions = [one["session"] for one in told]
    if nodes.leads(group.rank):
        clear_stale(root)
        if not sessions[group.rank]:  # another run's, or a new folder
            for path in list_checkpoints(root):
                discard(path)
    group.barrier()
    return Site(root, nodes, group, device, run, session, sessions[group.rank] != max(sessions))


def _session(root: Path, run: str) -> str:
    """The newest session of this run that the node has taken part in; empty when there is none."""
    try:
        told = json.loads((root / _SESSION).read_text())
    except (OSError, ValueError):
        return ""
    return str(told["session"]) if told["run"] == run else ""

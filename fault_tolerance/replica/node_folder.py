"""Determines a rank's node and manages the in-memory folder of replicas that the ranks of a node share.

scratch/replicas/.node              identifies the node
                 .session           the newest start of the run in which this node has taken part
                 step-00000010/     the parts of a save; also manifest.json if they were gathered after a restart
                 .saving-*          parts of a save that is in progress or was never completed
"""

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import psutil

from bagualu.comm.group import Group
from bagualu.comm.objects import gather_json
from bagualu.fault_tolerance.checkpoint.agree import on_all
from bagualu.fault_tolerance.checkpoint.layout.directory import clear_stale, discard, list_checkpoints
from bagualu.fault_tolerance.checkpoint.layout.format import step_of
from bagualu.fault_tolerance.replica.nodes import NodeMap, node_token

T = TypeVar("T")
REPLICAS = "replicas"
"""Name of the folder of replicas in a launch's scratch folder."""
_SESSION = ".session"


@dataclass(frozen=True)
class Site:
    """The folder of this rank's node. `run` identifies the run; `session`, its present start, sorts after the sessions of earlier
    starts."""

    root: Path
    nodes: NodeMap
    group: Group
    run: str
    session: str
    stale: bool
    """Whether the run went on without this node before this start: the folder of another node records a later session than this
    node's folder. A replica that exists only on such nodes is not used."""

    @property
    def leads(self) -> bool:
        """Whether this rank acts for its node: only this rank of the node removes and renames replicas in the shared folder."""
        return self.nodes.leads(self.group.rank)

    @property
    def beside(self) -> tuple[int, ...]:
        """The positions in the group of the ranks on this node, including this rank."""
        return self.nodes.beside(self.group.rank)

    def on_all(self, function: Callable[[], T]) -> T:
        """Calls `function` and returns this rank's result. If it fails on any rank, raises the same error on every rank (see
        checkpoint/agree.py). Collective."""
        return on_all(function, self.group)

    def begin(self) -> None:
        """Records in the node's folder that this node takes part in `session`. Raises OSError."""
        if self.leads:
            unfinished = self.root / f"{_SESSION}-new"
            unfinished.write_text(json.dumps({"run": self.run, "session": self.session}))
            unfinished.replace(self.root / _SESSION)

    def forget(self, keep: int = 0, after: int = -1) -> None:
        """Keeps the newest `keep` replicas of steps up to `after` (negative: of all steps) and removes the others.

        Only the rank that `leads` does this. Raises CheckpointError if a replica cannot be removed.
        """
        if self.leads:
            held = list_checkpoints(self.root)
            later = [path for path in held if after >= 0 and (step_of(path) or 0) > after]
            earlier = [path for path in held if path not in later]
            for path in [*later, *earlier[: max(0, len(earlier) - keep)]]:
                discard(path)

    def free_bytes(self) -> int:
        """Returns the bytes of memory available to replicas on this node, including what replicas use now."""
        taken = sum(file.stat().st_size for file in self.root.rglob("*") if file.is_file())
        return min(shutil.disk_usage(self.root).free, psutil.virtual_memory().available) + taken


def open_site(scratch: Path, run: str, session: str, group: Group) -> Site:
    """Determines which ranks share nodes, removes replicas that can no longer be used, and returns this rank's site. Collective.
    Raises OSError or CheckpointError if the folder cannot be used or cleared."""
    root = scratch / REPLICAS

    def look() -> dict[str, str]:
        root.mkdir(parents=True, exist_ok=True)
        return {"node": node_token(root), "session": _session(root, run)}

    answers = gather_json(on_all(look, group), group)
    nodes = NodeMap.by_token([answer["node"] for answer in answers])
    sessions = [answer["session"] for answer in answers]
    if nodes.leads(group.rank):
        clear_stale(root)
        if not sessions[group.rank]:  # it is a new folder or another run's
            for path in list_checkpoints(root):
                discard(path)
    group.barrier()
    return Site(root, nodes, group, run, session, sessions[group.rank] != max(sessions))


def _session(root: Path, run: str) -> str:
    """Returns the latest session of `run` in which this node has taken part, as its folder records; "" if it records none."""
    try:
        session = json.loads((root / _SESSION).read_text())
    except (OSError, ValueError):
        return ""
    return str(session["session"]) if session["run"] == run else ""

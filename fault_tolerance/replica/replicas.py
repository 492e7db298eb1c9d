"""Keeps copies (replicas) of each rank's state in memory: on its own node and, if there are several nodes, on a partner's node.

    every rank    writes its part | sends it to the partner, verifies what it received | waits | the node's leader renames | waits
    Until the second wait ends, the previous replica is the newest; afterwards every node has the new replica.

When a process dies, its node's memory stays as it was; when a node dies, its partners still have copies. Between saves, memory
holds two generations. The older is removed when the next save begins, so that there are never three.
"""

import logging
import os
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from bagualu.comm.errors import RecipeError
from bagualu.comm.group import Group
from bagualu.comm.monitor import Phase
from bagualu.comm.objects import gather_json
from bagualu.fault_tolerance.checkpoint.layout.directory import discard
from bagualu.fault_tolerance.checkpoint.layout.format import CheckpointError, step_name
from bagualu.fault_tolerance.replica.node_folder import open_site
from bagualu.fault_tolerance.replica.recover import Replica, survey
from bagualu.fault_tolerance.replica.shard import Origin, shard_name, table_name, verify_part, write_part
from bagualu.fault_tolerance.replica.transfer import Transfer, deliver
from bagualu.parallel.boxes import TensorPiece

GENERATIONS = 2
_MARGIN = 1.05
"""Factor by which a replica may take more memory than its tensors: headers, tables and partly used pages."""
log = logging.getLogger(__name__)


class Replicas:
    """The replicas of a run, for the ranks of `group`. Every method is collective over the group, as is the constructor."""

    def __init__(self, scratch: Path, run: str, session: str, group: Group) -> None:
        """`scratch` is a folder in memory that this node's ranks share. `run` identifies the run, the same for all its starts.
        `session` identifies this start, the same on every rank; it sorts after the sessions of earlier starts.

        Raises OSError.
        """
        self.site = open_site(scratch, run, session, group)
        self.off = False
        """Whether a replica could not be made, e.g. because memory ran out; then this process makes no more replicas."""

    def check_room(self, own_bytes: int) -> None:
        """Raises RecipeError on every rank if a node has too little memory for replicas; the tensors of this rank's part take
        `own_bytes`."""
        site, nodes = self.site, self.site.nodes
        room = {"free": site.free_bytes(), "folder": str(site.root.parent)} if site.leads else {}
        answers = gather_json({"bytes": own_bytes, **room}, site.group)
        for node, members in enumerate(nodes.members):
            kept, leader = [*members, *(other for member in members for other in nodes.kept_for[member])], answers[members[0]]
            needs = GENERATIONS * int(_MARGIN * sum(answers[position]["bytes"] for position in kept))
            if leader["free"] < needs:
                raise RecipeError(
                    f"checkpoint.replica_every needs {_gigabytes(needs)} of memory in {leader['folder']} on node {node} (rank "
                    f"{site.group.ranks[members[0]]}), {GENERATIONS} generations of {len(kept)} ranks' state, but has "
                    f"{_gigabytes(leader['free'])}; give it more (a bigger /dev/shm, more nodes) or checkpoint.replica_every=0"
                )

    def candidates(self) -> list[Replica]:
        """Returns the replicas to resume from, newest first: those whose parts all exist on some node. A quick check has found no
        damage in them."""
        return survey(self.site)

    def start(self, step: int | None) -> None:
        """Begins this start of the run, which has resumed from the replica of `step` (None: from no replica). Removes the replicas
        of steps after `step` and, of the others, all but the newest GENERATIONS; with None, all replicas."""

        def settle() -> None:
            self.site.forget(GENERATIONS if step is not None else 0, -1 if step is None else step)
            self.site.begin()

        self.site.on_all(settle)

    def keep(self, step: int, pieces: Iterable[TensorPiece], metadata: dict[str, Any]) -> None:
        """Makes a replica of the state after `step` steps. If this fails, a warning is logged and this process makes no more
        replicas; the run goes on.

        The pieces of all ranks together hold every element of every tensor exactly once. `metadata` is plain JSON, the same on all
        ranks.
        """
        if self.off:
            return
        site = self.site
        temporary = site.root / f".saving-{step_name(step)}-{site.session}"
        try:
            self._make(step, temporary, pieces, metadata)
        except CheckpointError as error:
            self.off = True
            shutil.rmtree(temporary, ignore_errors=True)
            if site.group.rank == 0:
                log.warning("step %d: no replica: %s; no more will be made, training continues with checkpoints only", step, error)

    def _make(self, step: int, temporary: Path, pieces: Iterable[TensorPiece], metadata: dict[str, Any]) -> None:
        site, group = self.site, self.site.group
        group.monitor.at(Phase.REPLICATE)
        site.on_all(lambda: site.forget(keep=1))
        origin = Origin(step, site.session, site.run, group.size)

        def write() -> None:
            temporary.mkdir(exist_ok=True)
            write_part(temporary, group.rank, pieces, metadata, origin)

        site.on_all(write)
        if site.nodes.count > 1:
            group.monitor.at(Phase.MIRROR)
            self._copy(temporary, origin)
        group.monitor.at(Phase.PUBLISH)
        site.on_all(lambda: self._commit(temporary, step))

    def _copy(self, temporary: Path, origin: Origin) -> None:
        """Sends this rank's part to its partner on the next node and verifies the parts that this rank receives. Collective."""
        site, group = self.site, self.site.group
        names = (shard_name, table_name)
        own = torch.tensor([_size(temporary / name(group.rank)) for name in names], device=group.device)
        sizes = own.new_empty((group.size, len(names)))
        group.all_gather(sizes, own)
        transfers = [
            Transfer(position, partner, name(position), size)
            for position, (partner, row) in enumerate(zip(site.nodes.partners, sizes.tolist(), strict=True))
            for name, size in zip(names, row, strict=True)
            if partner is not None
        ]

        def send_and_verify() -> None:
            deliver(transfers, temporary, temporary, group)
            for position in site.nodes.kept_for[group.rank]:
                verify_part(temporary, position, origin)

        site.on_all(send_and_verify)

    def _commit(self, temporary: Path, step: int) -> None:
        if self.site.leads:
            final = temporary.with_name(step_name(step))
            if final.exists():  # made before the run went back behind this step
                discard(final)
            os.rename(temporary, final)

    def forget_after(self, step: int) -> None:
        """Removes the replicas of steps after `step`, the step to which the run goes back, and of the others all but the newest
        GENERATIONS. Raises CheckpointError on every rank if that fails on any rank."""
        self.site.on_all(lambda: self.site.forget(GENERATIONS, step))

    def remove(self) -> None:
        """Removes all replicas and their folder at the end of the run."""
        site = self.site
        site.group.barrier()
        if site.leads:
            shutil.rmtree(site.root, ignore_errors=True)


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def _gigabytes(count: int) -> str:
    return f"{count / 1e9:.3g} GB"

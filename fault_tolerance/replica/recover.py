"""Recovers replicas after a restart: finds those that the nodes still hold and makes a checkpoint directory that every node can
read.

A node is taken to hold a part only if all bytes of the part match their hashes. A node receives the shards that it needs but does
not hold from a node that holds them.
"""

import logging
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from bagualu.comm.monitor import Phase
from bagualu.comm.objects import gather_json
from bagualu.fault_tolerance.checkpoint.layout.directory import list_checkpoints
from bagualu.fault_tolerance.checkpoint.layout.format import MANIFEST, CheckpointError, Manifest, step_name
from bagualu.fault_tolerance.checkpoint.layout.manifest import encode
from bagualu.fault_tolerance.replica.node_folder import Site
from bagualu.fault_tolerance.replica.shard import (
    Origin,
    ShardTable,
    part_of,
    parts_in,
    read_table,
    shard_name,
    table_name,
    verify_part,
    whole,
    write_table,
)
from bagualu.fault_tolerance.replica.transfer import Transfer, deliver
from bagualu.parallel.boxes import Box

log = logging.getLogger(__name__)

Wanted = Iterable[tuple[str, Box]]
"""The boxes that a rank is going to read, as pairs (name of the global tensor, box)."""


def _held(root: Path) -> list[dict[str, Any]]:
    """Returns the saves of which the node's folder `root` holds parts whose table and size are right (their bytes are not read):
    {"origin": fields of Origin, "ranks": [...]}."""
    held: list[dict[str, Any]] = []
    for path in list_checkpoints(root):
        ranks: dict[Origin, list[int]] = {}
        for part in parts_in(path):
            try:
                ranks.setdefault(read_table(path, part).origin, []).append(part)
            except CheckpointError as error:
                log.warning("replica: this copy is not used: %s", error)
        held += [{"origin": asdict(origin), "ranks": parts} for origin, parts in ranks.items()]
    return held


@dataclass(frozen=True)
class Replica:
    """A replica from which the run can resume."""

    site: Site
    origin: Origin

    @property
    def step(self) -> int:
        return self.origin.step

    @property
    def name(self) -> str:
        return replica_name(self.step)

    def fetch(self, wanted: Wanted) -> Path:
        """Makes the boxes `wanted` by this rank readable on its node and returns the path of a checkpoint directory in the node's
        memory.

        Collective. Raises CheckpointError on every rank if all copies of a part are damaged or memory runs out.
        """
        site = self.site
        site.group.monitor.at(Phase.FETCH)
        folder = site.root / step_name(self.step)
        site.on_all(lambda: folder.mkdir(exist_ok=True))
        held = self._verified(folder)
        holders = self._holders(list(held))
        tables = self._tables({part: table for part, table in held.items() if holders[part][0] == site.group.rank})
        manifest = whole(tables)
        transfers = self._transfers(manifest, holders, wanted)
        arriving = site.root / f".saving-{folder.name}-{site.session}-fetched"
        site.on_all(lambda: self._receive(transfers, folder, arriving, tables))
        site.on_all(lambda: self._publish(manifest, folder, arriving))
        return folder

    def _verified(self, folder: Path) -> dict[int, ShardTable]:
        """Returns the tables, by part, of the undamaged parts in `folder` among those that this rank verifies; the ranks of a node
        divide all parts there among them."""
        beside, verified = self.site.beside, {}
        for part in parts_in(folder)[beside.index(self.site.group.rank) :: len(beside)]:
            try:
                verified[part] = verify_part(folder, part, self.origin)
            except CheckpointError as error:
                log.warning("%s: this copy is not used: %s", self.name, error)
        return verified

    def _holders(self, own: list[int]) -> dict[int, list[int]]:
        """Returns, by part, the positions that have verified a copy on their node; `own` are the parts that this rank has verified.
        Collective. Raises CheckpointError if no position has verified a part."""
        holders: dict[int, list[int]] = {part: [] for part in range(self.origin.ranks)}
        for position, parts in enumerate(gather_json(own, self.site.group)):
            for part in parts:
                holders[part].append(position)
        lost = [part for part, positions in holders.items() if not positions]
        if lost:
            raise CheckpointError(f"{self.name}: there is no undamaged copy of the state of ranks {lost[:8]}")
        return holders

    def _tables(self, own: dict[int, ShardTable]) -> dict[int, ShardTable]:
        """Returns the tables of all parts, by part; `own` are those that this rank sends to the others. Collective."""
        texts = {part: table.encode().decode() for part, table in own.items()}
        answers = gather_json(texts, self.site.group)
        return {int(part): ShardTable.decode(text.encode()) for answer in answers for part, text in answer.items()}

    def _transfers(self, manifest: Manifest, holders: dict[int, list[int]], wanted: Wanted) -> list[Transfer]:
        """Returns the transfers after which every node holds the shards that its ranks want to read. Collective."""
        nodes, transfers = self.site.nodes, []
        wanted_shards = gather_json(sorted(shards_of(manifest, wanted)), self.site.group)
        for node, members in enumerate(nodes.members):
            present = {shard_name(part) for part, positions in holders.items() if any(nodes.of[p] == node for p in positions)}
            missing = sorted({name for member in members for name in wanted_shards[member]} - present)
            for turn, name in enumerate(missing):
                sources = holders[part_of(name)]
                destination = members[turn % len(members)]
                transfers.append(Transfer(sources[destination % len(sources)], destination, name, manifest.files[name].bytes))
        return transfers

    def _receive(self, transfers: list[Transfer], folder: Path, arriving: Path, tables: dict[int, ShardTable]) -> None:
        """Takes part in the transfers, verifies the parts that this rank receives and moves them into `folder`. Raises OSError, or
        CheckpointError if a received part is damaged."""
        arriving.mkdir(exist_ok=True)
        deliver(transfers, folder, arriving, self.site.group)
        for transfer in transfers:
            if transfer.destination == self.site.group.rank:
                part = part_of(transfer.name)
                write_table(arriving, part, tables[part])
                verify_part(arriving, part, self.origin)
                for name in (transfer.name, table_name(part)):
                    (arriving / name).replace(folder / name)

    def _publish(self, manifest: Manifest, folder: Path, arriving: Path) -> None:
        """Adds the manifest that makes `folder` a checkpoint, if this rank acts for its node. Raises OSError."""
        if self.site.leads:
            (arriving / MANIFEST).write_bytes(encode(manifest))
            (arriving / MANIFEST).replace(folder / MANIFEST)
            arriving.rmdir()


def survey(site: Site) -> list[Replica]:
    """Returns the replicas of this run whose parts all exist on some node, at least one of them on a node that is not `Site.stale`,
    newest first; the same on every rank. Collective."""
    answers = gather_json({"stale": site.stale, "held": _held(site.root) if site.leads else []}, site.group)
    holders: dict[Origin, set[int]] = {}
    current: set[Origin] = set()
    for answer in answers:
        for part in answer["held"]:
            origin = Origin(**part["origin"])
            holders.setdefault(origin, set()).update(part["ranks"])
            if not answer["stale"]:
                current.add(origin)
    replicas = []
    for origin in sorted(holders, reverse=True):
        missing = sorted(set(range(origin.ranks)) - holders[origin])
        if site.group.rank == 0 and (missing or origin not in current):
            why = (
                f"no node holds the state of ranks {missing[:8]}"
                if missing
                else "the run has continued without the node that holds it"
            )
            log.warning("the replica of step %d is not used: %s", origin.step, why)
        if not missing and origin in current and origin.run == site.run:
            replicas.append(Replica(site, origin))
    return replicas


def replica_name(step: int) -> str:
    """Returns the name of a replica for messages."""
    return f"the replica of step {step} in memory"


def shards_of(manifest: Manifest, wanted: Wanted) -> set[str]:
    """Returns the names of the shards in `manifest` that contain elements of the boxes `wanted`."""
    return {
        stored.file
        for name, box in wanted
        if name in manifest.tensors
        for stored in manifest.tensors[name].boxes
        if stored.box.intersection(box)
    }

"""After a restart: which replicas the nodes still hold, and how one becomes a checkpoint directory that every node can read.

Only parts whose every byte matches its hash count as held. What a node needs and does not hold is sent to it by one that does.
"""

import logging
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from bagualu.fault_tolerance.checkpoint.directory import list_checkpoints
from bagualu.fault_tolerance.checkpoint.exchange import gather_json
from bagualu.fault_tolerance.checkpoint.format import MANIFEST, CheckpointError, Manifest, step_name
from bagualu.fault_tolerance.checkpoint.manifest import encode
from bagualu.fault_tolerance.replica.part import (
    Origin,
    Table,
    part_of,
    parts_in,
    read_table,
    shard_name,
    table_name,
    verify_part,
    whole,
    write_table,
)
from bagualu.fault_tolerance.replica.site import Site
from bagualu.fault_tolerance.replica.transfer import Transfer, deliver
from bagualu.parallel.boxes import Box

log = logging.getLogger(__name__)

Wanted = Iterable[tuple[str, Box]]
"""Names of global tensors, and the boxes of them that a rank is going to read."""


def _held(root: Path) -> list[dict[str, Any]]:
    """Origins of the parts in a node's folder, each with the ranks whose parts lie there, as far as a quick look shows."""
    found: list[dict[str, Any]] = []
    for path in list_checkpoints(root):
        ranks: dict[Origin, list[int]] = {}
        for part in parts_in(path):
            try:
                ranks.setdefault(read_table(path, part).origin, []).append(part)
            except CheckpointError as error:
                log.warning("replica: this copy is not used: %s", error)
        found += [{"origin": asdict(origin), "ranks": held} for origin, held in ranks.items()]
    return found


@dataclass(frozen=True)
class Replica:
    """One that can be gone on from."""

    site: Site
    origin: Origin

    @property
    def step(self) -> int:
        return self.origin.step

    @property
    def name(self) -> str:
        return replica_name(self.step)

    def fetch(self, wanted: Wanted) -> Path:
        """Make the boxes of `wanted` readable here: the path of a checkpoint directory in this node's memory.

        Collective. Raises CheckpointError on every rank when a part is damaged everywhere it lies, or memory runs out.
        """
        site = self.site
        site.group.monitor.at("fetch")
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

    def _verified(self, folder: Path) -> dict[int, Table]:
        """Tables of the undamaged parts in `folder`, of those that are this rank's to look at: a node's ranks share them out."""
        beside, found = self.site.beside, {}
        for part in parts_in(folder)[beside.index(self.site.group.rank) :: len(beside)]:
            try:
                found[part] = verify_part(folder, part, self.origin)
            except CheckpointError as error:
                log.warning("%s: this copy is not used: %s", self.name, error)
        return found

    def _holders(self, own: list[int]) -> dict[int, list[int]]:
        """By part, the positions that have found an undamaged copy on their node. Raises CheckpointError where there is none."""
        holders: dict[int, list[int]] = {part: [] for part in range(self.origin.ranks)}
        for position, parts in enumerate(gather_json(own, self.site.group, self.site.device)):
            for part in parts:
                holders[part].append(position)
        lost = [part for part, positions in holders.items() if not positions]
        if lost:
            raise CheckpointError(f"{self.name}: there is no undamaged copy of the state of ranks {lost[:8]}")
        return holders

    def _tables(self, own: dict[int, Table]) -> dict[int, Table]:
        """The tables of all parts, from the ranks that each speak for some."""
        texts = {part: table.encode().decode() for part, table in own.items()}
        told = gather_json(texts, self.site.group, self.site.device)
        return {int(part): Table.decode(text.encode()) for answer in told for part, text in answer.items()}

    def _transfers(self, manifest: Manifest, holders: dict[int, list[int]], wanted: Wanted) -> list[Transfer]:
        """What goes from where to where so that every node holds the shards that its ranks want to read."""
        nodes, found = self.site.nodes, []
        wishes = gather_json(sorted(shards_of(manifest, wanted)), self.site.group, self.site.device)
        for node, members in enumerate(nodes.members):
            here = {shard_name(part) for part, positions in holders.items() if any(nodes.of[one] == node for one in positions)}
            missing = sorted({name for member in members for name in wishes[member]} - here)
            for turn, name in enumerate(missing):
                able = holders[part_of(name)]
                destination = members[turn % len(members)]
                found.append(Transfer(able[destination % len(able)], destination, name, manifest.files[name].bytes))
        return found

    def _receive(self, transfers: list[Transfer], folder: Path, arriving: Path, tables: dict[int, Table]) -> None:
        """Take part in the transfers, and verify what has come before it gets its place. Raises OSError, CheckpointError."""
        arriving.mkdir(exist_ok=True)
        deliver(transfers, folder, arriving, self.site.group, self.site.device)
        for transfer in transfers:
            if transfer.destination == self.site.group.rank:
                part = part_of(transfer.name)
                write_table(arriving, part, tables[part])
                verify_part(arriving, part, self.origin)
                for name in (transfer.name, table_name(part)):
                    (arriving / name).replace(folder / name)

    def _publish(self, manifest: Manifest, folder: Path, arriving: Path) -> None:
        """The leader: what makes a checkpoint of the folder. Raises OSError."""
        if self.site.leads:
            (arriving / MANIFEST).write_bytes(encode(manifest))
            (arriving / MANIFEST).replace(folder / MANIFEST)
            arriving.rmdir()


def survey(site: Site) -> list[Replica]:
    """Replicas of which every part lies on some node, newest first. Collective; the same on every rank."""
    told = gather_json({"stale": site.stale, "held": _held(site.root) if site.leads else []}, site.group, site.device)
    holders: dict[Origin, set[int]] = {}
    current: set[Origin] = set()
    for answer in told:
        for part in answer["held"]:
            origin = Origin(**part["origin"])
            holders.setdefault(origin, set()).update(part["ranks"])
            if not answer["stale"]:
                current.add(origin)
    found = []
    for origin in sorted(holders, reverse=True):
        missing = sorted(set(range(origin.ranks)) - holders[origin])
        if site.group.rank == 0 and (missing or origin not in current):
            why = (
                f"nobody holds the state of ranks {missing[:8]}"
                if missing
                else "the run has gone on without the node that holds it"
            )
            log.warning("the replica of step %d is not used: %s", origin.step, why)
        if not missing and origin in current and origin.run == site.run:
            found.append(Replica(site, origin))
    return found


def replica_name(step: int) -> str:
    """For people."""
    return f"the replica of step {step} in memory"


def shards_of(manifest: Manifest, wanted: Wanted) -> set[str]:
    """Names of the shards in which elements of the wanted boxes lie."""
    return {
        stored.file
        for name, box in wanted
        if name in manifest.tensors
        for stored in manifest.tensors[name].boxes
        if stored.box.intersection(box)
    }

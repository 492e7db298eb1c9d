"""Damage to what a rank holds between two updates: optimizer state against its seal, working weights against their owners'.

- The seal: checksums of master weights and moments, taken after an update and compared before the next one. Nothing may change them
  in between, so whoever finds a difference is the one that is damaged.
- Replicas: the owner of a shard derives its working weights from its master weights, and that is the truth about every copy. So
  two ranks are enough to tell which is wrong, and all weights can be gathered again. State that several ranks hold alike
  (ZeRO off, parameters that tensor ranks or the two ends of the pipeline share) is compared as well.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from bagualu.comm.group import Group
from bagualu.fault_tolerance.guard.checksum import checksum
from bagualu.fault_tolerance.guard.engine import GuardedEngine, StateShard
from bagualu.parallel.mesh import Mesh


@dataclass(frozen=True)
class Damage:
    """One damaged thing on one rank."""

    kind: str
    """"state": differs from its seal; "replica": differs from the other holders of the same; "copy": a working copy of weights."""
    what: str
    """For people, e.g. "exp_avg of layers.3.down.weight and 4 more"."""
    owner: int
    """Global rank whose state it is, or that the copy should equal."""
    axis: str = ""
    """The axis along which others hold the same state; "": nobody does."""
    place: int = 0
    """Which it is among the shards that are held along this axis."""
    holders: tuple[int, ...] = ()
    """Global ranks that hold the same state, this one among them."""


class DamageCheck:
    """One rank's. `inspect` is collective; `seal` is not."""

    def __init__(self, engine: GuardedEngine, mesh: Mesh) -> None:
        self._engine, self._mesh = engine, mesh
        self._seal: list[list[int]] | None = None
        self.found: list[Damage] = []

    @property
    def rank(self) -> int:
        group = self._mesh.group("world")
        return group.ranks[group.rank]

    @property
    def sealed(self) -> bool:
        return self._seal is not None

    def seal(self) -> None:
        """Until `break_seal` the state must not change."""
        self._seal = self._state().tolist()

    def break_seal(self) -> None:
        """The state changes lawfully."""
        self._seal = None

    def inspect(self) -> bool:
        """Compare everything. Whether this rank is damaged; `found` says where."""
        state = self._state()
        rows: list[list[int]] = state.tolist()
        self.found = self._broken(rows) + self._strange(state) + self._bad_copies(state)
        return bool(self.found)

    def not_finite(self, spoilt: Sequence[tuple[int, str]]) -> list[Damage]:
        """Damage of this rank's (shard, kind of its state) that an update left with values that are not finite."""
        return [self._damaged_state("replica", index, kind) for index, kind in spoilt]

    def repair(self, damages: Sequence[Sequence[Damage]]) -> None:
        """Put right what `damages` (by rank, the same on every rank) names: from another holder, or from the master weights.

        Collective. They must be `repairable`.
        """
        for damage in _distinct(damages):
            if damage.axis and self.rank in damage.holders:
                group = self._mesh.group(damage.axis)
                source = group.ranks.index(_intact_holder(damage, damages))
                for tensor in self._engine.shards()[self._shared(damage.axis)[damage.place]].tensors.values():
                    group.broadcast(tensor, source)
        self._engine.publish()

    def _state(self) -> torch.Tensor:
        """Checksums of this rank's optimizer state [shards, kinds]."""
        shards = self._engine.shards()
        return torch.stack([torch.stack([checksum(tensor) for tensor in shard.tensors.values()]) for shard in shards])

    def _broken(self, rows: list[list[int]]) -> list[Damage]:
        if self._seal is None:
            return []
        kinds = list(self._engine.shards()[0].tensors)
        return [
            self._damaged_state("state", index, kind)
            for index, (now, sealed) in enumerate(zip(rows, self._seal, strict=True))
            for kind, one, other in zip(kinds, now, sealed, strict=True)
            if one != other
        ]

    def _strange(self, state: torch.Tensor) -> list[Damage]:
        """State that this rank does not hold as the other holders do."""
        kinds, found = list(self._engine.shards()[0].tensors), []
        for axis in self._sharing_axes():
            members, group = self._shared(axis), self._mesh.group(axis)
            table = _gather(state[members], group)
            for place, index in enumerate(members):
                for column, kind in enumerate(kinds):
                    if _stands_alone([row[place][column] for row in table], group.rank):
                        found.append(self._damaged_state("replica", index, kind, axis))
        return found

    def _sharing_axes(self) -> list[str]:
        """Axes of more than one rank along which all hold the same optimizer state of some buckets."""
        axes = ("fold", "replica", "tensor", "ends")
        return [axis for axis in axes if self._shared(axis) and self._mesh.group(axis).size > 1]

    def _shared(self, axis: str) -> list[int]:
        """The shards whose state all ranks along `axis` hold alike; in the same order on all of them."""
        return [index for index, shard in enumerate(self._engine.shards()) if axis in shard.held_along]

    def _bad_copies(self, state: torch.Tensor) -> list[Damage]:
        """Working weights that are not what their owner's master weights make them."""
        shards, found = self._engine.shards(), []
        for axis in sorted({shard.axis for shard in shards}):
            members = [index for index, shard in enumerate(shards) if shard.axis == axis]
            copies = [torch.stack([checksum(part) for part in shards[index].copies]) for index in members]
            truths = _gather(torch.stack([self._truth(index, state) for index in members]), self._mesh.group(axis))
            for place, (index, own) in enumerate(zip(members, copies, strict=True)):
                shard = shards[index]
                for part, copy in enumerate(own.tolist()):
                    owner = part if shard.partitioned else shard.group.rank
                    if copy != truths[owner][place]:
                        found.append(self._bad_copy(shard, shard.group.ranks[owner]))
        return found

    def _bad_copy(self, shard: StateShard, owner: int) -> Damage:
        """Without a seal on the owner's state it may be the owner that is wrong, and nothing can be made from it."""
        if self.sealed:
            return Damage("copy", f"working copy of {shard.name}", owner)
        return Damage("replica", f"working copy of {shard.name}, not as on rank {owner}", self.rank, "", 0, (self.rank, owner))

    def _truth(self, index: int, state: torch.Tensor) -> torch.Tensor:
        """Checksum of this rank's shard of the working weights as it should be."""
        shard = self._engine.shards()[index]
        master, working = shard.tensors["weight"], shard.copies[0]
        return state[index, 0] if master.dtype == working.dtype else checksum(master.to(working.dtype))

    def _damaged_state(self, kind: str, index: int, what: str, axis: str | None = None) -> Damage:
        shard = self._engine.shards()[index]
        axis = next((one for one in self._sharing_axes() if one in shard.held_along), "") if axis is None else axis
        name = f"{what} of {shard.name}"
        if not axis:
            return Damage(kind, name, self.rank)
        return Damage(kind, name, self.rank, axis, self._shared(axis).index(index), self._mesh.group(axis).ranks)


def as_json(damages: Sequence[Damage]) -> list[dict[str, Any]]:
    return [asdict(damage) for damage in damages]


def from_json(rows: Sequence[dict[str, Any]]) -> list[Damage]:
    """The opposite of `as_json`."""
    return [Damage(**{**row, "holders": tuple(row["holders"])}) for row in rows]


def blame(damages: Sequence[Sequence[Damage]]) -> list[list[Damage]]:
    """What is truly damaged, by rank, of what every rank found on itself.

    A broken seal is certain. Next to one, those who merely differ from its owner are not at fault: they hold what was true.
    """
    broken = {rank for rank, own in enumerate(damages) if any(damage.kind == "state" for damage in own)}

    def certain(damage: Damage) -> bool:
        compared_with = (damage.owner,) if damage.kind == "copy" else damage.holders
        return damage.kind == "state" or not broken.intersection(compared_with)

    return [[damage for damage in own if certain(damage)] for own in damages]


def repairable(damages: Sequence[Sequence[Damage]]) -> bool:
    """Whether for all damaged state somebody holds the same, undamaged. Working copies can always be made anew."""
    return all(_intact_holder(damage, damages) >= 0 for own in damages for damage in own if damage.kind != "copy")


def _distinct(damages: Sequence[Sequence[Damage]]) -> list[Damage]:
    """One for every damaged piece of state, in an order that is the same on all ranks."""
    pieces = {(damage.axis, damage.place, damage.holders): damage for own in damages for damage in own if damage.kind != "copy"}
    return list(pieces.values())


def _intact_holder(damage: Damage, damages: Sequence[Sequence[Damage]]) -> int:
    """A rank that holds the same state undamaged; -1: there is none."""
    piece = (damage.axis, damage.place, damage.holders)
    for holder in damage.holders if damage.axis else ():
        if all((other.axis, other.place, other.holders) != piece or other.kind == "copy" for other in damages[holder]):
            return holder
    return -1


def _gather(own: torch.Tensor, group: Group) -> list[Any]:
    """Every member's integers, by position."""
    output = own.new_empty(group.size, *own.shape)
    group.all_gather(output, own.contiguous())
    rows: list[Any] = output.tolist()
    return rows


def _stands_alone(values: list[int], own: int) -> bool:
    """Whether the value at place `own` is not what most hold; where no value is held by more than half, all are in doubt."""
    value, count = Counter(values).most_common(1)[0]
    if len(set(values)) == 1:
        return False
    return count * 2 <= len(values) or values[own] != value

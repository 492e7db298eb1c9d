"""Detects and repairs damage to a rank's optimizer state and working weights between two updates.

- The seal: checksums of master weights and moments, taken after an update and compared before the next one. Nothing may change them
  in between, so a rank whose checksums differ is damaged.
- Copies: the owner of a shard derives its working weights from its master weights, and every copy on other ranks must equal them.
  So it is known which rank is wrong even if there are only two, and all weights can be gathered again.
- Replicas: state that several ranks hold (ZeRO off, parameters that tensor ranks or the first and last stage share) is compared.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from bagualu.comm.group import Group
from bagualu.fault_tolerance.guard.checksum import checksum
from bagualu.fault_tolerance.guard.engine import GuardedEngine, StateShard
from bagualu.parallel.layout import COPIES
from bagualu.parallel.mesh import Mesh


@dataclass(frozen=True)
class Damage:
    """A damaged tensor of optimizer state, or a damaged copy of working weights, on one rank."""

    kind: str
    """How it was detected. "state": it differs from its seal; "replica": it differs from other holders of the same state, an update
    left it non-finite, or a working copy is wrong and there is no seal. "copy": the working weights differ from the intact owner's
    master weights."""
    what: str
    """Description for messages, e.g. "exp_avg of layers.3.down.weight and 4 more"."""
    owner: int
    """Global rank whose state is damaged; for kind "copy", the global rank that owns the state from which the working weights are
    made."""
    axis: str = ""
    """The mesh axis along which other ranks hold the same state; "" if no other rank holds it."""
    index: int = 0
    """Index of the damaged shard among the shards that all ranks along `axis` hold; 0 without an axis."""
    holders: tuple[int, ...] = ()
    """Global ranks that hold the same state, including the damaged rank; empty if no other rank holds it. For a working copy
    without a seal, the two ranks that differ."""


class DamageCheck:
    """Checks this rank's optimizer state and working weights. `inspect` is collective; `seal` is not."""

    def __init__(self, engine: GuardedEngine, mesh: Mesh) -> None:
        self._engine, self._mesh = engine, mesh
        self._seal: list[list[int]] | None = None
        self.damages: list[Damage] = []

    @property
    def rank(self) -> int:
        group = self._mesh.group("world")
        return group.ranks[group.rank]

    @property
    def sealed(self) -> bool:
        return self._seal is not None

    def seal(self) -> None:
        """Takes checksums of the optimizer state, which must not change until `break_seal` is called."""
        self._seal = self._state().tolist()

    def break_seal(self) -> None:
        """Drops the checksums that `seal` took; call this when the state is changed on purpose."""
        self._seal = None

    def inspect(self) -> bool:
        """Compares all state with the seal (if any) and other holders, and working weights with their owners' master weights.
        Returns whether this rank is damaged, and lists its damage in `damages`.

        Collective.
        """
        state = self._state()
        rows: list[list[int]] = state.tolist()
        self.damages = self._broken(rows) + self._different_replicas(state) + self._bad_copies(state)
        return bool(self.damages)

    def not_finite(self, spoilt: Sequence[tuple[int, str]]) -> list[Damage]:
        """Returns a Damage for each tensor of this rank's state that an update left non-finite, given as (index of the shard, kind
        of tensor)."""
        return [self._damaged_state("replica", index, kind) for index, kind in spoilt]

    def repair(self, damages: Sequence[Sequence[Damage]]) -> None:
        """Repairs damaged state by a copy from an intact holder, and makes all working weights again from the master weights.

        Collective. `damages[r]` is the damage of global rank r, the same on every rank; it must be `repairable`.
        """
        for damage in _distinct(damages):
            if damage.axis and self.rank in damage.holders:
                group = self._mesh.group(damage.axis)
                source = group.ranks.index(_intact_holder(damage, damages))
                for tensor in self._engine.shards()[self._shared(damage.axis)[damage.index]].tensors.values():
                    group.broadcast(tensor, source)
        self._engine.publish()

    def _state(self) -> torch.Tensor:
        """Returns the checksums of this rank's optimizer state, int64 [shards, kinds of tensors]; 0 for kinds that a shard does not
        have."""
        rows = [torch.stack([checksum(tensor) for tensor in shard.tensors.values()]) for shard in self._engine.shards()]
        return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)

    def _broken(self, rows: list[list[int]]) -> list[Damage]:
        if self._seal is None:
            return []
        shards = self._engine.shards()
        return [
            self._damaged_state("state", index, kind)
            for index, (now, sealed) in enumerate(zip(rows, self._seal, strict=True))
            for kind, current, original in zip(shards[index].tensors, now, sealed, strict=False)
            if current != original
        ]

    def _different_replicas(self, state: torch.Tensor) -> list[Damage]:
        """Returns the damage of this rank's state that differs from other holders' replicas. Collective."""
        shards, damages = self._engine.shards(), []
        for axis in self._sharing_axes():
            members, group = self._shared(axis), self._mesh.group(axis)
            table = _gather(state[members], group)
            for position, index in enumerate(members):
                for column, kind in enumerate(shards[index].tensors):
                    if _differs_from_majority([row[position][column] for row in table], group.rank):
                        damages.append(self._damaged_state("replica", index, kind, axis))
        return damages

    def _sharing_axes(self) -> list[str]:
        """Returns the axes of more than one rank along which all ranks hold the same optimizer state of at least one shard."""
        axes = ("fold", "replica", "fold" + COPIES, "replica" + COPIES, "tensor", "ends")
        return [axis for axis in axes if self._shared(axis) and self._mesh.group(axis).size > 1]

    def _shared(self, axis: str) -> list[int]:
        """Returns the indices of the shards whose state is the same on all ranks along `axis`, in the same order on all of them."""
        return [index for index, shard in enumerate(self._engine.shards()) if axis in shard.held_along]

    def _bad_copies(self, state: torch.Tensor) -> list[Damage]:
        """Returns the damage of this rank's working weights that differ from their owner's master weights. Collective."""
        shards, damages = self._engine.shards(), []
        for axis in sorted({shard.axis for shard in shards}):
            members = [index for index, shard in enumerate(shards) if shard.axis == axis]
            copies = [torch.stack([checksum(part) for part in shards[index].copies]) for index in members]
            truths = _gather(torch.stack([self._truth(index, state) for index in members]), self._mesh.group(axis))
            for position, (index, own) in enumerate(zip(members, copies, strict=True)):
                shard = shards[index]
                for part, copy in enumerate(own.tolist()):
                    owner = part if len(own) > 1 else shard.group.rank
                    if copy != truths[owner][position]:
                        damages.append(self._bad_copy(shard, shard.group.ranks[owner]))
        return damages

    def _bad_copy(self, shard: StateShard, owner: int) -> Damage:
        """Returns the Damage of a working copy. Without a seal the owner may be the damaged rank, so both are named and neither is
        repaired."""
        if self.sealed:
            return Damage("copy", f"working copy of {shard.name}", owner)
        return Damage("replica", f"working copy of {shard.name}, not as on rank {owner}", self.rank, "", 0, (self.rank, owner))

    def _truth(self, index: int, state: torch.Tensor) -> torch.Tensor:
        """Returns the checksum that this rank's shard of the working weights should have, from its master weights."""
        shard = self._engine.shards()[index]
        master, working = shard.tensors["weight"], shard.copies[0]
        return state[index, 0] if master.dtype == working.dtype else checksum(master.to(working.dtype))

    def _damaged_state(self, kind: str, index: int, what: str, axis: str | None = None) -> Damage:
        shard = self._engine.shards()[index]
        axis = next((shared for shared in self._sharing_axes() if shared in shard.held_along), "") if axis is None else axis
        name = f"{what} of {shard.name}"
        if not axis:
            return Damage(kind, name, self.rank)
        return Damage(kind, name, self.rank, axis, self._shared(axis).index(index), tuple(self._mesh.group(axis).ranks))


def as_json(damages: Sequence[Damage]) -> list[dict[str, Any]]:
    return [asdict(damage) for damage in damages]


def from_json(rows: Sequence[dict[str, Any]]) -> list[Damage]:
    """Returns the damages that `as_json` has converted to `rows`."""
    return [Damage(**{**row, "holders": tuple(row["holders"])}) for row in rows]


def blame(damages: Sequence[Sequence[Damage]]) -> list[list[Damage]]:
    """Returns the damages of every rank, by rank, without those that another rank's damage explains.

    A broken seal proves damage. A rank that only differs from a rank with a broken seal is not damaged.
    """
    broken = {rank for rank, own in enumerate(damages) if any(damage.kind == "state" for damage in own)}

    def certain(damage: Damage) -> bool:
        compared_with = (damage.owner,) if damage.kind == "copy" else damage.holders
        return damage.kind == "state" or not broken.intersection(compared_with)

    return [[damage for damage in own if certain(damage)] for own in damages]


def repairable(damages: Sequence[Sequence[Damage]]) -> bool:
    """Returns whether each damaged piece of state has an intact copy on some rank. Damage of kind "copy" is always repairable:
    working weights can be made again."""
    return all(_intact_holder(damage, damages) >= 0 for own in damages for damage in own if damage.kind != "copy")


def _distinct(damages: Sequence[Sequence[Damage]]) -> list[Damage]:
    """Returns one Damage for every damaged piece of state (none of kind "copy"), in the same order on all ranks."""
    pieces = {(damage.axis, damage.index, damage.holders): damage for own in damages for damage in own if damage.kind != "copy"}
    return list(pieces.values())


def _intact_holder(damage: Damage, damages: Sequence[Sequence[Damage]]) -> int:
    """Returns the first global rank that holds an undamaged copy of the state that `damage` is about; -1 if no rank does."""
    piece = (damage.axis, damage.index, damage.holders)
    for holder in damage.holders if damage.axis else ():
        if all((other.axis, other.index, other.holders) != piece or other.kind == "copy" for other in damages[holder]):
            return holder
    return -1


def _gather(own: torch.Tensor, group: Group) -> list[Any]:
    """Returns the values of `own` of every rank of the group, by position in the group. Collective."""
    output = own.new_empty(group.size, *own.shape)
    group.all_gather(output, own.contiguous())
    rows: list[Any] = output.tolist()
    return rows


def _differs_from_majority(values: list[int], own: int) -> bool:
    """Returns whether values[own] differs from the value of the majority. If `values` differ and no value has a majority, returns
    True for every `own`."""
    value, count = Counter(values).most_common(1)[0]
    if len(set(values)) == 1:
        return False
    return count * 2 <= len(values) or values[own] != value

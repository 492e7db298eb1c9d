"""A cluster as data: its chips, the tiers of links that join them, its storage and its failure rates.

Devices are numbered from 0 and rank r runs on device r. A tier of links joins `devices` neighbouring devices into a domain, e.g.
the 8 devices of a node or the 72 of a rack; the next tier joins several such domains. A group of ranks is a `range`, because every
group of a layout (parallel/layout.py) has a constant stride. Nothing here costs time or memory in proportion to the number of
ranks.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from math import gcd

from bagualu.comm.errors import RecipeError


@dataclass(frozen=True)
class ShapeEfficiency:
    """The fraction of the matmul peak that a product [m, k] x [k, n] reaches."""

    m: int
    n: int
    k: int
    fraction: float = field(metadata={"most": 1.0})


@dataclass(frozen=True)
class OperatorTime:
    """The measured time of an operator on tensors of some size."""

    dtype: str = field(metadata={"example": "bfloat16"})
    """The dtype of its first tensor."""
    work: float = field(metadata={"example": "2097152"})
    """The floating-point operations of matrix products; of other operators the bytes that are read and written."""
    seconds: float = field(metadata={"example": "1.0e-04"})


@dataclass(frozen=True)
class Chip:
    """One device."""

    name: str = field(metadata={"example": "H100 SXM5 80GB"})
    vendor: str = field(metadata={"example": "NVIDIA"})
    matmul_flops_per_second: Mapping[str, float] = field(metadata={"example": "{bfloat16: 9.894e+14}"})
    """For each dtype, the peak of dense matrix products, without sparsity."""
    memory_bytes: int = field(metadata={"example": "84942000000"})
    """The memory that programs can allocate, as the driver reports it."""
    memory_bytes_per_second: float = field(metadata={"example": "3.35e+12"})
    launch_seconds: float = field(metadata={"example": "4.0e-06"})
    """Fixed time of an operator on the device, whatever its size."""
    context_bytes: int = field(metadata={"example": "1000000000"})
    """Memory that the driver reports as used although no tensor uses it: the context, kernels, buffers of collectives."""
    cores: int | None = field(default=None, metadata={"example": "132"})
    """Units that compute tiles of a matrix product side by side, e.g. the streaming multiprocessors of a GPU. None: not known."""
    memory_fraction: float = field(default=1.0, metadata={"most": 1.0})
    """The part of memory_bytes_per_second that a kernel reaches which only reads and writes."""
    efficiency: Mapping[str, tuple[ShapeEfficiency, ...]] = field(default_factory=dict)
    """For each dtype, measured efficiencies of matrix products. Empty: not measured."""
    operators: Mapping[str, tuple[OperatorTime, ...]] = field(default_factory=dict)
    """For operators by torch's names, e.g. aten.silu.default, their measured times. Empty: not measured."""
    type: str = "cuda"
    """cpu, or cuda for a GPU and every other accelerator, which run the same operators. A CPU begins an operator only when the one
    before has ended, and its own processors move what ranks send each other."""

    def peak(self, dtype: str) -> float:
        """Returns the peak of matrix products of `dtype`, in floating-point operations per second. Raises RecipeError if it is
        unknown."""
        if dtype not in self.matmul_flops_per_second:
            raise RecipeError(f"train.dtype={dtype}: no matmul peak is known for {self.name}; give one of "
                              f"{', '.join(self.matmul_flops_per_second)}")  # fmt: skip
        return self.matmul_flops_per_second[dtype]


@dataclass(frozen=True)
class LinkTier:
    """The links that join neighbouring domains of the tier below (single devices, for the innermost tier) into one domain."""

    name: str
    latency_seconds: float = field(metadata={"example": "4.0e-06"})
    """Time of an empty message, and of one step of a collective."""
    bytes_per_second: float = field(metadata={"example": "5.0e+10"})
    """Bandwidth of large transfers per device and direction, if no other device uses the links."""
    devices: int | None = None
    """The number of devices in a domain; None: all devices of the cluster (or of the part of a mixed cluster)."""
    oversubscription: float = field(default=1.0, metadata={"least": 1.0})
    """Bandwidth of all devices of a domain of the tier below, divided by that of the links which lead out of this domain. In a tree
    of switches, each tier counts all that is lost below it too."""
    peer_bytes_per_second: float | None = None
    """Bandwidth between two devices, if less than bytes_per_second: each pair has its own link. Innermost tier only."""
    relative: Mapping[str, float] = field(default_factory=dict)
    """For kinds of communication (comm/cost.py), how many times bytes_per_second they reach, e.g. 1.3 for an all_reduce that the
    switch helps. 1 for kinds that are not here."""


@dataclass(frozen=True)
class Storage:
    """The storage that holds checkpoints."""

    read_bytes_per_second: float = field(metadata={"example": "1.0e+08"})
    """Per device, if all devices of the cluster read at the same time."""
    write_bytes_per_second: float = field(metadata={"example": "1.0e+08"})
    """Per device, if all devices of the cluster write at the same time."""
    device_bytes_per_second: float = field(metadata={"example": "1.0e+09"})
    """The most that one device can read or write, however few others do."""


@dataclass(frozen=True)
class ClusterPart:
    """Neighbouring devices with the same chip. A cluster of a single kind of chip is one part."""

    chip: Chip
    tiers: tuple[LinkTier, ...]
    """From the innermost."""
    devices: int | None = None
    """None: any number."""
    failures_per_device_hour: Mapping[str, float] = field(default_factory=dict)
    """For each component, how often it interrupts a job, per device and hour. Empty: unknown."""
    node_devices: int | None = None
    """The number of devices of a machine; None: as many as the innermost tier of links joins."""


@dataclass(frozen=True)
class Level:
    """One tier of links as a group of ranks uses it. For a mixed cluster, it has the slowest figures of the parts that the group
    touches."""

    name: str
    latency_seconds: float
    bytes_per_second: float
    """Per device and direction."""
    peer_bytes_per_second: float
    """Between two devices of a domain."""
    below: int
    """Devices in a domain of the tier below; 1 for the innermost tier."""
    uplink_bytes_per_second: float
    """Bandwidth out of a domain of the tier below, shared by its devices."""
    domains: int
    """The number of domains of this tier that hold ranks of the group."""
    most: int
    """The most ranks of the group in one domain."""
    relative: Mapping[str, float] = field(default_factory=dict)
    """For kinds of communication, how many times these bandwidths they reach."""


@dataclass(frozen=True)
class Cluster:
    """Parts, each of one kind of chip, one after the other."""

    name: str
    parts: tuple[ClusterPart, ...]
    start_seconds: float
    """Fixed time of a collective or a message, whatever its size: start of its kernel, handshake of its ranks."""
    joint: LinkTier | None = None
    """The links between parts; None for a single part."""
    algorithms: tuple[str, ...] = ()
    """The algorithms that the collective library has (comm/cost.py); empty: all."""
    storage: Storage | None = None
    """None: unknown."""
    quick: bool = False
    """Whether the figures come from few and short measurements (`bagualu doctor --quick`)."""
    by_ranks: Mapping[int, "Cluster"] = field(default_factory=dict)
    """For a machine whose processors the ranks share, what it is like for each number of ranks that was measured; the other fields
    are those of the largest number. Empty: the figures hold for any number of ranks."""

    @property
    def devices(self) -> int | None:
        """The number of devices; None: any number."""
        counts = [part.devices for part in self.parts]
        return None if None in counts else sum(count for count in counts if count is not None)

    @property
    def node_devices(self) -> int:
        """The number of devices of a machine; of machines that differ, the smallest number."""
        inner = [part.tiers[0].devices if part.tiers else 1 for part in self.parts]
        return min(part.node_devices or joined or part.devices or 1 for part, joined in zip(self.parts, inner, strict=True))

    def for_world(self, world: int) -> "Cluster":
        """Returns the cluster with exactly `world` devices, of a mixed cluster the same share of each part. Large domains that
        `world` does not fill are used alike: of 72 devices, 64 are, if `world` is 256.

        Raises RecipeError if there are not so many, if a part's share is not a number of whole domains of its innermost tier, or if
        a machine whose processors the ranks share was not measured with so many.
        """
        if world < 1:
            raise RecipeError(f"world={world} must be at least 1, e.g. world=8")
        if self.by_ranks:
            if world not in self.by_ranks:
                measured = " or ".join(map(str, sorted(self.by_ranks)))
                raise RecipeError(f"world={world}: cluster={self.name} was measured with {measured} ranks, which share its "
                                  f"processors; give world={_nearest(world, self.by_ranks)}")  # fmt: skip
            return self.by_ranks[world]
        if self.devices is not None and world > self.devices:
            raise RecipeError(f"world={world}: cluster={self.name} has {self.devices} devices; give world={self.devices} or less")
        if self.joint is None:
            return replace(self, parts=(replace(_used_alike(self.parts[0], world), devices=world),))
        step = self._world_step()
        if world % step:
            near = max(step, world - world % step)
            raise RecipeError(f"world={world}: cluster={self.name} is mixed, and takes whole nodes of each chip in the same "
                              f"proportion; give a multiple of {step}, e.g. world={near}")  # fmt: skip
        total = self._total()
        parts = tuple(replace(part, devices=(part.devices or 0) * world // total) for part in self.parts)
        return replace(self, parts=parts)

    def part_of(self, rank: int) -> ClusterPart:
        """Returns the part that holds `rank`. Raises ValueError if the cluster has no such device."""
        for first, part in self._placed():
            if rank >= first and (part.devices is None or rank < first + part.devices):
                return part
        raise ValueError(f"cluster {self.name} has devices 0 to {(self.devices or 0) - 1}, not {rank}")

    def levels(self, ranks: range) -> tuple[Level, ...]:
        """Returns the tiers that the group `ranks` (ascending) uses, from the innermost to the first in which a single domain holds
        the whole group. Raises ValueError if the group is empty or the cluster has no such devices."""
        if not ranks or ranks.step < 1 or ranks[0] < 0:
            raise ValueError(f"{ranks} is not an ascending range of at least one rank")
        self.part_of(ranks[-1])
        touched = [
            (first, part, own)
            for first, part in self._placed()
            if (own := _within(ranks, first, None if part.devices is None else first + part.devices))
        ]
        tiers = [[_level(part, tier, first, own) for first, part, own in touched] for tier in range(len(touched[0][1].tiers))]
        levels = [_slowest(level) for level in tiers]
        if len(touched) > 1 and self.joint is not None:
            levels.append(_joined(self.joint, [part.devices or 0 for _, part, _ in touched], len(ranks)))
        last = next(index for index, level in enumerate(levels) if level.domains == 1)
        return tuple(levels[: last + 1])

    def _placed(self) -> Iterator[tuple[int, ClusterPart]]:
        """Yields (first device, part)."""
        first = 0
        for part in self.parts:
            yield first, part
            first += part.devices or 0

    def _total(self) -> int:
        return sum(part.devices or 0 for part in self.parts)

    def _world_step(self) -> int:
        """Returns the smallest world in which every part has its share in whole domains of its innermost tier."""
        common = gcd(*(part.devices or 0 for part in self.parts))
        units = [(part.devices or 0) // common for part in self.parts]
        times = 1
        while any(unit * times % (part.tiers[0].devices or 1) for unit, part in zip(units, self.parts, strict=True)):
            times += 1
        return sum(units) * times


def _nearest(number: int, others: Iterable[int]) -> int:
    return min(others, key=lambda other: abs(other - number))


def as_range(ranks: "range | tuple[int, ...]") -> range:
    """Returns a group of ranks as an ascending range. Raises ValueError if its ranks have no constant stride."""
    if isinstance(ranks, range):
        return ranks if ranks.step > 0 else ranks[::-1]
    ordered = sorted(ranks)
    stride = ordered[1] - ordered[0] if len(ordered) > 1 else 1
    if not ordered or stride < 1 or ordered != list(found := range(ordered[0], ordered[-1] + 1, stride)):
        raise ValueError(f"ranks {ordered[:8]} have no constant stride")
    return found


LEAST_USED = 0.88
"""A job leaves at most the rest of each domain to others: 8 of 72 devices, but not 1 of 8."""


def _used_alike(part: ClusterPart, world: int) -> ClusterPart:
    """Returns the part whose innermost domains each have as many devices as the job takes of them: the most that divide `world`,
    where that leaves few over. Schedulers place jobs so (SLURM's --segment), since groups would otherwise lie across domains."""
    if not part.tiers or part.tiers[0].devices is None or world <= part.tiers[0].devices:
        return part
    inner, *outer = part.tiers
    domain = inner.devices or 1
    used = max(count for count in range(1, domain + 1) if world % count == 0)
    whole = all(tier.devices is None or tier.devices % used == 0 for tier in outer)
    enough = part.devices is None or world // used * domain <= part.devices
    if used < LEAST_USED * domain or not whole or not enough:
        return part
    return replace(part, tiers=(replace(inner, devices=used), *outer))


def _within(ranks: range, first: int, end: int | None) -> range:
    """Returns those of `ranks` from `first` to before `end` (None: no end), relative to `first`."""
    stride, start = ranks.step, ranks[0]
    low = max(0, -(-(first - start) // stride))
    high = len(ranks) if end is None else min(len(ranks), max(low, -(-(end - start) // stride)))
    return range(start + low * stride - first, start + high * stride - first, stride)


def _level(part: ClusterPart, index: int, first: int, own: range) -> Level:
    """Returns the level of tier `index` of one part for the ranks `own`, relative to the part's first device."""
    tier = part.tiers[index]
    below = part.tiers[index - 1].devices or 1 if index else 1
    domains, most = (1, len(own)) if tier.devices is None else (_domains(own, tier.devices), _most(own, tier.devices))
    peer = tier.bytes_per_second if tier.peer_bytes_per_second is None else tier.peer_bytes_per_second
    uplink = below * tier.bytes_per_second / tier.oversubscription
    return Level(tier.name, tier.latency_seconds, tier.bytes_per_second, peer, below, uplink, domains, most, tier.relative)


def _slowest(levels: list[Level]) -> Level:
    """Returns the levels of the same tier in several parts as one, with the slowest figures."""
    return Level(
        name=" and ".join(dict.fromkeys(level.name for level in levels)),
        latency_seconds=max(level.latency_seconds for level in levels),
        bytes_per_second=min(level.bytes_per_second for level in levels),
        peer_bytes_per_second=min(level.peer_bytes_per_second for level in levels),
        below=min(level.below for level in levels),
        uplink_bytes_per_second=min(level.uplink_bytes_per_second / level.below for level in levels)
        * min(level.below for level in levels),
        domains=sum(level.domains for level in levels),
        most=max(level.most for level in levels),
        relative={kind: min(level.relative.get(kind, 1.0) for level in levels) for level in levels for kind in level.relative},
    )


def _joined(tier: LinkTier, sizes: list[int], count: int) -> Level:
    """Returns the level of the links between parts of `sizes` devices for a group of `count` ranks."""
    bandwidth, below = tier.bytes_per_second, min(sizes)
    uplink = below * bandwidth / tier.oversubscription
    return Level(tier.name, tier.latency_seconds, bandwidth, bandwidth, below, uplink, 1, count, tier.relative)


def _domains(ranks: range, size: int) -> int:
    """Returns how many domains of `size` devices hold any of `ranks`."""
    return len(ranks) if ranks.step >= size else ranks[-1] // size - ranks[0] // size + 1


def _most(ranks: range, size: int) -> int:
    """Returns the most of `ranks` in one domain of `size` devices."""
    if ranks.step >= size:
        return 1
    first, last = ranks[0] // size, ranks[-1] // size
    period = ranks.step // gcd(ranks.step, size)  # the pattern of full domains repeats after as many
    chosen = {first, last, *range(first + 1, min(last, first + 1 + period))}
    return max(_count(ranks, domain * size, (domain + 1) * size) for domain in chosen)


def _count(ranks: range, low: int, high: int) -> int:
    """Returns how many of `ranks` lie in [low, high)."""
    return len(_within(ranks, low, high))

"""Seconds of a collective on a described cluster: the alpha-beta model over its tiers of links.

A message takes a latency (alpha) and its bytes divided by a bandwidth (beta). Sizes are those of NCCL's tests: `message_bytes` is
the size of the whole buffer, that is the input of all_reduce, reduce_scatter, all_to_all, broadcast and p2p on each rank, and the
output of all_gather. Notation of the formulas: n ranks, S bytes; tier t has latency a_t; s_t is the number of domains of tier t - 1
that the group has in a domain of tier t, and m_t that of its ranks there (m_-1 = 1); b_t is a rank's share of the bandwidth of
tier t.

Sources:
- ring, tree of a broadcast, pairwise: Thakur, Rabenseifner, Gropp, "Optimization of Collective Communication Operations in MPICH",
  IJHPCA 19(1), 2005, sections 4.1 to 4.5.
- tree of all_reduce (a double binary tree, which uses both directions of each link): Sanders, Speck, Träff, "Two-tree algorithms
  for full bandwidth broadcast, reduction and scan", Parallel Computing 35, 2009.
- rings, latencies per tier, trees between nodes with chains inside: NCCL, src/graph/tuning.cc, ncclTopoTuneModel.
- hierarchical: BaGuaLu, PPoPP'22 (all_to_all); Cho et al., "BlueConnect", MLSys 2019, section 3 (all_reduce).
"""

from dataclasses import dataclass
from math import ceil, inf, log2

from bagualu.comm.topology import Cluster, Level, as_range

KINDS = {
    "all_reduce": ("ring", "rings", "tree", "hierarchical"),
    "all_gather": ("ring", "rings", "hierarchical"),
    "reduce_scatter": ("ring", "rings", "hierarchical"),
    "broadcast": ("ring", "rings", "tree"),
    "all_to_all": ("pairwise", "hierarchical"),
    "p2p": ("direct",),
}
"""For each kind of collective, its algorithms."""
ALGORITHMS = ("ring", "rings", "tree", "hierarchical")
"""The algorithms that a collective library may or may not have; pairwise and direct need no support."""


@dataclass(frozen=True)
class CollectiveCost:
    """What a collective takes with one algorithm."""

    algorithm: str
    latency_seconds: float
    """The part that does not depend on the size."""
    transfer_seconds: float
    """The part in proportion to the size."""

    @property
    def seconds(self) -> float:
        return self.latency_seconds + self.transfer_seconds


@dataclass(frozen=True)
class _Use:
    """How a group uses one tier of links."""

    latency: float
    size: int
    """s_t: domains of the tier below in one domain of this tier."""
    inner: int
    """m_(t-1): ranks of the group in a domain of the tier below."""
    ranks: int
    """m_t: ranks of the group in a domain of this tier."""
    hops: int
    """Neighbours in the order of the ranks that are joined by this tier."""
    share: float
    """Bytes per second of a rank if all ranks of the group use the tier."""
    single: float
    """Bytes per second of a rank if it alone crosses out of its domain of the tier below, to a single other rank."""


def collective_cost(
    cluster: Cluster,
    kind: str,
    message_bytes: float,
    ranks: range | tuple[int, ...],
    algorithm: str | None = None,
    groups: int | None = None,
    sharers: int = 1,
) -> CollectiveCost:
    """Returns the cost of one collective of the group `ranks`, or of one message between the two `ranks` of p2p.

    `algorithm` is one of KINDS[kind]; None: the cheapest that the cluster's library has. `groups` is the number of groups of the
    same kind that communicate at the same time out of each domain: 1 means that this group has the links to itself; None means that
    every device belongs to such a group, as in training. `sharers` is the number of communications at the same time on each device,
    e.g. 2 if a gradient reduction overlaps with messages of the pipeline; each gets an equal part of the links.

    Raises ValueError for an unknown kind or algorithm, a negative size, or ranks that the cluster does not have.
    """
    if kind not in KINDS:
        raise ValueError(f"{kind} is no collective; there are {', '.join(KINDS)}")
    if algorithm is not None and algorithm not in KINDS[kind]:
        raise ValueError(f"{kind} has no algorithm {algorithm}; there are {', '.join(KINDS[kind])}")
    if message_bytes < 0 or sharers < 1 or (groups is not None and groups < 1):
        raise ValueError(f"{kind}: {message_bytes} bytes, {groups} groups and {sharers} sharers must not be negative or zero")
    group = as_range(ranks)
    if kind == "p2p" and len(group) != 2:
        raise ValueError(f"p2p is between two ranks, not {len(group)}")
    if len(group) == 1:
        return CollectiveCost(algorithm or KINDS[kind][0], 0.0, 0.0)
    uses = _uses(kind, cluster.levels(group), len(group), groups, sharers)
    names = [algorithm] if algorithm else [name for name in KINDS[kind] if _available(cluster, name)]
    costs = [_cost(kind, name, message_bytes, uses, len(group), cluster.start_seconds) for name in names]
    return min(costs, key=lambda cost: cost.seconds)


def collective_seconds(
    cluster: Cluster,
    kind: str,
    message_bytes: float,
    ranks: range | tuple[int, ...],
    groups: int | None = None,
    sharers: int = 1,
) -> float:
    """Returns the seconds of `collective_cost` with the cheapest algorithm."""
    return collective_cost(cluster, kind, message_bytes, ranks, None, groups, sharers).seconds


def _available(cluster: Cluster, algorithm: str) -> bool:
    return not cluster.algorithms or algorithm not in ALGORITHMS or algorithm in cluster.algorithms


def _cost(kind: str, algorithm: str, size: float, uses: list[_Use], n: int, start: float) -> CollectiveCost:
    """Returns the cost of the collective `kind` of `size` bytes; an all_reduce is a reduce_scatter and an all_gather."""
    latency, transfer = _pass(kind, algorithm, size, uses, n)
    passes = 2 if kind == "all_reduce" else 1
    return CollectiveCost(algorithm, start + passes * latency, passes * transfer)


def _pass(kind: str, algorithm: str, size: float, uses: list[_Use], n: int) -> tuple[float, float]:
    """Returns (latency, transfer), in seconds, of one pass of the data through the group."""
    sent = size if kind == "broadcast" else size * (n - 1) / n
    """Bytes that each rank of a ring sends."""
    match algorithm:
        case "ring":
            return _ring_latency(uses), sent / min(use.single for use in uses if use.hops)
        case "rings":
            return _ring_latency(uses), sent / _rings_width(uses)
        case "tree":
            return _tree_latency(uses), size / _rings_width(uses)
        case "pairwise":
            return _pairwise(uses, size, n)
        case "direct":
            return _message(uses, size)
    return _all_to_all(uses, size) if kind == "all_to_all" else _phases(uses, size)


def _ring_latency(uses: list[_Use]) -> float:
    """A piece of data passes every hop of the ring but one: sum of hops_t a_t (NCCL: nInterSteps * interLat + ...)."""
    return sum(use.hops * use.latency for use in uses)


def _tree_latency(uses: list[_Use]) -> float:
    """A chain inside the innermost domains, binary trees above: (s_0 - 1) a_0 + sum of ceil(log2 s_t) a_t (NCCL)."""
    return (uses[0].size - 1) * uses[0].latency + sum(ceil(log2(use.size)) * use.latency for use in uses[1:])


def _rings_width(uses: list[_Use]) -> float:
    """Bytes per second of as many rings side by side as there are links out of a domain (NCCL's channels): the links of all m_(t-1)
    ranks of a domain carry what crosses tier t, so the slowest tier carries min over t of m_(t-1) b_t."""
    return min(use.inner * use.share for use in uses if use.hops)


def _phases(uses: list[_Use], size: float) -> tuple[float, float]:
    """One phase per tier, one after the other, from the innermost: sum of (s_t - 1) a_t and of
    (s_t - 1) / s_t * S / m_(t-1) / b_t, because a rank takes only its part of the result of the tier below to the next tier."""
    latency = sum((use.size - 1) * use.latency for use in uses)
    return latency, sum((use.size - 1) / use.size * size / use.inner / use.share for use in uses)


def _all_to_all(uses: list[_Use], size: float) -> tuple[float, float]:
    """One phase per tier: a rank collects all that goes to the same domain, so it has s_t - 1 instead of n - 1 partners, but sends
    all its bytes again on each tier: sum of (s_t - 1) a_t and of (s_t - 1) / s_t * S / b_t."""
    latency = sum((use.size - 1) * use.latency for use in uses)
    return latency, sum((use.size - 1) / use.size * size / use.share for use in uses)


def _pairwise(uses: list[_Use], size: float, n: int) -> tuple[float, float]:
    """Exchanges S / n with one partner after the other: sum of (m_t - m_(t-1)) a_t and of (m_t - m_(t-1)) / n * S / b_t."""
    latency = sum((use.ranks - use.inner) * use.latency for use in uses)
    return latency, sum((use.ranks - use.inner) / n * size / use.share for use in uses)


def _message(uses: list[_Use], size: float) -> tuple[float, float]:
    """One message over the only tier that joins two ranks: a_t and S / b_t."""
    (use,) = [use for use in uses if use.hops]
    return use.latency, size / use.single


def _uses(kind: str, levels: tuple[Level, ...], n: int, groups: int | None, sharers: int) -> list[_Use]:
    """Returns the use of each tier by a `kind` of collective of `n` ranks. What crosses a tier passes the links of the tiers below
    it too."""
    uses, inner, domains, share, single = [], 1, n, inf, inf
    for level in levels:
        size = ceil(level.most / inner)
        together = level.below / inner if groups is None else groups  # groups that cross out of a domain of the tier below
        part = level.relative.get(kind, 1.0) / sharers
        share = min(share, _crossing(level, min(level.below, together * inner)) * part)
        single = min(single, _crossing(level, max(1.0, min(level.below, together))) * part)
        peers = max(1, size - 1) * level.peer_bytes_per_second * part
        uses.append(
            _Use(
                latency=level.latency_seconds,
                size=size,
                inner=inner,
                ranks=level.most,
                hops=domains - level.domains,
                share=min(share, peers),
                single=min(single, level.peer_bytes_per_second * part),
            )
        )
        inner, domains = level.most, level.domains
    return uses


def _crossing(level: Level, active: float) -> float:
    """Returns the bytes per second of each of `active` devices of a domain that send out of it at the same time."""
    return min(level.bytes_per_second, level.uplink_bytes_per_second / active)

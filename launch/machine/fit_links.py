"""Finds the links that explain measured communications best: their latency, bandwidth and fixed start in the model of
comm/cost.py."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import exp, log
from statistics import mean

from bagualu.comm.cost import collective_seconds
from bagualu.comm.topology import Chip, Cluster, ClusterPart, LinkTier
from bagualu.launch.machine.figures import LinkTime

_LARGE = 2**19
_NO_CHIP = Chip("", "", {}, 1, 1.0, 1.0, 1)
_LEAST_SECONDS = 1e-8


@dataclass(frozen=True)
class Links:
    """The only tier of a machine."""

    latency_seconds: float
    bytes_per_second: float
    start_seconds: float
    relative: Mapping[str, float] = field(default_factory=dict)
    """For each kind of communication, how many times that bandwidth it reaches."""


def fit(measured: Sequence[LinkTime]) -> Links:
    """Returns the links for which the sum of squared logarithms of predicted over measured times is least, by a search along one
    figure after the other with ever smaller factors."""
    smallest = min(one.seconds for one in measured)
    fastest = max(one.bytes / one.seconds for one in measured)
    best = Links(max(_LEAST_SECONDS, smallest / 2), fastest, max(_LEAST_SECONDS, smallest / 2))
    error, factor = _error(best, measured), 4.0
    while factor > 1.005:
        tried = [_changed(best, name, by) for name in ("latency_seconds", "bytes_per_second", "start_seconds")
                 for by in (factor, 1 / factor)]  # fmt: skip
        nearer = min(tried, key=lambda links: _error(links, measured))
        if (found := _error(nearer, measured)) < error:
            best, error = nearer, found
        else:
            factor **= 0.5
    return replace(best, relative=_relative(best, measured))


def _relative(links: Links, measured: Sequence[LinkTime]) -> dict[str, float]:
    """Returns, for each kind, the mean factor between its bandwidth and that of `links`: of large messages, without latencies."""
    large = [one for one in measured if one.bytes >= _LARGE] or [max(measured, key=lambda one: one.bytes)]
    whole, fixed = predicted(links, large), predicted(links, [replace(one, bytes=0) for one in large])
    factors: dict[str, list[float]] = {}
    for one, seconds, least in zip(large, whole, fixed, strict=True):
        factors.setdefault(one.kind, []).append(log((seconds - least) / max(one.seconds - least, one.seconds / 2)))
    return {kind: exp(mean(logarithms)) for kind, logarithms in factors.items()}


def predicted(links: Links, measured: Sequence[LinkTime]) -> list[float]:
    """Returns the seconds of communications over `links`."""
    tier = LinkTier("machine", links.latency_seconds, links.bytes_per_second, relative=links.relative)
    cluster = Cluster("this", (ClusterPart(_NO_CHIP, (tier,)),), links.start_seconds)
    return [
        collective_seconds(cluster, one.kind, one.bytes, range(2 if one.kind == "p2p" else one.ranks), groups=1) for one in measured
    ]


def _error(links: Links, measured: Sequence[LinkTime]) -> float:
    times = predicted(links, measured)
    return sum(log(seconds / one.seconds) ** 2 for seconds, one in zip(times, measured, strict=True))


def _changed(links: Links, name: str, factor: float) -> Links:
    return replace(links, **{name: max(_LEAST_SECONDS, getattr(links, name) * factor)})

"""Small clusters for tests."""

from dataclasses import replace
from typing import Any

from bagualu.comm.topology import Chip, Cluster, ClusterPart, LinkTier

CHIP = Chip("chip", "vendor", {"bfloat16": 1e14}, 10**10, 1e12, 1e-6, 10**8)
NODE = LinkTier("node", 1e-6, 1e11, 8)
NETWORK = LinkTier("network", 5e-6, 1e10)


def single(*tiers: LinkTier, devices: int | None = None, **settings: Any) -> Cluster:
    """Returns a cluster of one kind of chip, without a fixed time of collectives unless `settings` has one."""
    part = ClusterPart(CHIP, tiers, devices)
    return replace(Cluster("test", (part,), 0.0), **settings)


def mixed(first: int, second: int, joint: LinkTier) -> Cluster:
    """Returns a cluster of two parts with so many devices, in nodes of 8 and of 4."""
    parts = (
        ClusterPart(CHIP, (NODE, NETWORK), first),
        ClusterPart(replace(CHIP, name="other"), (replace(NODE, devices=4), NETWORK), second),
    )
    return Cluster("mixed", parts, 0.0, joint)

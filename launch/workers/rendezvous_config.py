"""Describes where the agents of a run's nodes meet, and how many agents there are."""

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Meeting:
    """The rendezvous of a run; the same on every node."""

    host: str
    """Name or address, reachable from the other nodes, of the node whose agent hosts the rendezvous store."""
    port: int
    """Port at which the rendezvous store listens."""
    id: str
    """Name that distinguishes this start of the run from other starts and runs that use the same host and port (--id)."""
    job: str
    """Name that distinguishes the run's job from others that use its directory; it stays the same when the job is requeued."""
    nodes: int
    """The largest number of nodes that take part in the run (launch.nodes)."""
    fewest: int
    """The smallest number of nodes with which the run can start or go on; the same as `nodes` unless restart.elastic=true."""
    secret: str = field(repr=False)
    """The secret with which the agents sign their messages (secret.py)."""

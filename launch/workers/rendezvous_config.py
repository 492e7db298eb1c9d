"""Where and with how many other nodes a node's agent meets. Free of torch."""

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Meeting:
    """The same for every node of a run."""

    host: str
    """The node whose agent holds the rendezvous store, as the others can reach it."""
    port: int
    id: str
    """Tells this run from others at the same place."""
    job: str
    """Tells the run's job from others in its directory; the same when it is put back into the queue."""
    nodes: int
    """As many as there may be."""
    fewest: int
    """As few as may go on."""
    secret: str = field(repr=False)
    """With which the agents sign what they tell each other (secret.py)."""

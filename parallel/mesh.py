"""The communication groups of a rank, by axis name, derived from the layout."""

from dataclasses import dataclass

import torch

from bagualu.comm.group import Communicator, Group
from bagualu.comm.monitor import Monitor
from bagualu.parallel.layout import COPIES, SHARD, Layout, StagePlacement


@dataclass(frozen=True)
class Mesh:
    """A rank's view of the layout.

    Groups: tensor; pipeline and further groups of the same ranks (see `messages`); fold (ranks with the same dense parameters);
    expert (ranks with the other experts); replica (ranks with the same experts); ends (the ranks of the first and the last stage,
    for tied embeddings; only those ranks have it); world; alone (this rank); with Layout.shard also the two tiers of fold and
    replica (Layout.peers).
    """

    layout: Layout
    placement: StagePlacement
    """The assignment of stages to the ranks of the pipeline axis."""
    coordinates: dict[str, int]
    groups: dict[str, Group]

    @staticmethod
    def build(layout: Layout, communicator: Communicator, placement: StagePlacement | None = None) -> "Mesh":
        """Creates this rank's groups and returns its mesh. Without a placement, every pipeline rank holds a single stage.

        All `layout.world` ranks call this together.
        """
        rank = communicator.rank
        placement = placement or StagePlacement(layout.pipeline)
        at = layout.coordinates(rank)
        groups = {"world": communicator.world, "alone": communicator.group((rank,), "alone")}
        tiers = [axis + tier for axis in ("fold", "replica") for tier in (SHARD, COPIES)] if layout.shard else []
        for axis in ("tensor", "fold", "expert", "replica", "pipeline", *tiers):
            groups[axis] = communicator.group(layout.peers(axis, rank), axis)
        pipeline = layout.peers("pipeline", rank)
        for name in ("pipeline_back", *_RETURNING) if placement.chunks > 1 else ("pipeline_back",):
            groups[name] = communicator.group(pipeline, name)
        ends = sorted({placement.rank_of(0), placement.rank_of(placement.stages - 1)})
        if at["pipeline"] in ends:
            groups["ends"] = communicator.group(tuple(pipeline[coordinate] for coordinate in ends), "ends")
        mesh = Mesh(layout, placement, at, groups)
        _open_connections(mesh, communicator)
        return mesh

    def group(self, axis: str) -> Group:
        return self.groups[axis]

    @property
    def monitor(self) -> Monitor:
        """The record of what this rank is doing."""
        return self.group("world").monitor

    def at(self, axis: str) -> int:
        """Returns this rank's coordinate on `axis`."""
        return self.coordinates[axis]

    @property
    def reports(self) -> bool:
        """Whether this rank reports metrics on behalf of its tensor group, whose ranks all compute the same values."""
        return self.at("tensor") == 0

    def sum_over(self, axis: str, *values: torch.Tensor) -> list[float]:
        """Returns, for each of `values`, scalars of this rank, the sum over the ranks along `axis`, in float64, with a single
        reduction. Collective."""
        together = torch.stack([value.double() for value in values])
        self.group(axis).all_reduce(together)
        return self.group(axis).read(together)

    def messages(self, gradients: bool, source: int, destination: int) -> Group:
        """Returns the group in which pipeline rank `source` sends activations, or gradients, to `destination`.

        Each kind and direction has its own group, because some backends (NCCL) run the messages between two ranks of a group one
        after the other, and a send ends only when it is received. If both directions shared a group, two ranks could each wait in a
        send for a receive that is queued behind the other's send.
        """
        return self.group(message_group(gradients, source, destination))

    @property
    def stages(self) -> list[int]:
        """The stages that this rank holds, in the order of the model."""
        return self.placement.stages_of(self.at("pipeline"))

    @property
    def first_stage(self) -> bool:
        """Whether this rank holds the first stage."""
        return self.stages[0] == 0

    @property
    def last_stage(self) -> bool:
        """Whether this rank holds the last stage."""
        return self.stages[-1] == self.placement.stages - 1


def _open_connections(mesh: Mesh, communicator: Communicator) -> None:
    """Sends one element over every connection of the pipeline, one connection after the other.

    Some backends (NCCL) connect two ranks at their first message, and both block until then. The first messages of a schedule come
    in an order in which ranks would block each other forever.
    """
    own, element = mesh.at("pipeline"), torch.zeros(1, device=communicator.device)
    for gradients, source, destination in _connections(mesh.placement):
        if source == own:
            mesh.messages(gradients, source, destination).send(element, destination)
        elif destination == own:
            mesh.messages(gradients, source, destination).receive(element, source)


def _connections(placement: StagePlacement) -> list[tuple[bool, int, int]]:
    """Returns (whether it carries gradients, source, destination) for every connection between pipeline ranks."""
    connections: dict[tuple[bool, int, int], None] = {}
    for stage in range(placement.stages):
        for gradients, step in ((False, 1), (True, -1)):
            destination = placement.neighbour(stage, step)
            if destination is not None:
                connections[gradients, placement.rank_of(stage), destination] = None
    return list(connections)


_RETURNING = ("pipeline_return", "pipeline_back_return")


def message_group(gradients: bool, source: int, destination: int) -> str:
    """Returns the name of the group in which `source` sends activations, or gradients, to `destination`.

    Activations go to a later rank and gradients to an earlier rank, except where the stages wrap around or run back (V shape).
    """
    returning = (destination > source) if gradients else (destination < source)
    return ("pipeline_back" if gradients else "pipeline") + ("_return" if returning else "")

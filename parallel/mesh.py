"""The groups of one rank, by axis name, all derived from the layout."""

from dataclasses import dataclass

import torch

from bagualu.comm.group import Communicator, Group
from bagualu.comm.monitor import Monitor
from bagualu.parallel.layout import Layout
from bagualu.parallel.pipeline.schedule import Placement


@dataclass(frozen=True)
class Mesh:
    """One rank's view of the layout.

    Groups: tensor, pipeline and its relatives (see `messages`), fold (holders of the same dense parameters), expert (holders of the
    other experts), replica (holders of the same experts), ends (the ranks of the first and the last stage, for tied embeddings;
    absent elsewhere) and world.
    """

    layout: Layout
    placement: Placement
    """Which stages lie where along the pipeline axis."""
    coordinates: dict[str, int]
    groups: dict[str, Group]

    @staticmethod
    def build(layout: Layout, communicator: Communicator, placement: Placement | None = None) -> "Mesh":
        """Called by every rank; `layout.world` ranks in all. Without a placement every rank of the pipeline holds one stage."""
        rank = communicator.rank
        placement = placement or Placement(layout.pipeline)
        at = layout.coordinates(rank)
        groups = {"world": communicator.world}
        for axis in ("tensor", "fold", "expert", "replica", "pipeline"):
            groups[axis] = communicator.group(layout.peers(axis, rank), axis)
        pipeline = layout.peers("pipeline", rank)
        for name in ("pipeline_back", *_RETURNING) if placement.chunks > 1 else ("pipeline_back",):
            groups[name] = communicator.group(pipeline, name)
        ends = sorted({placement.rank_of(0), placement.rank_of(placement.stages - 1)})
        if at["pipeline"] in ends:
            groups["ends"] = communicator.group(tuple(pipeline[place] for place in ends), "ends")
        mesh = Mesh(layout, placement, at, groups)
        _say_hello(mesh, communicator)
        return mesh

    def group(self, axis: str) -> Group:
        return self.groups[axis]

    @property
    def monitor(self) -> Monitor:
        """What this rank is doing."""
        return self.group("world").monitor

    def at(self, axis: str) -> int:
        """This rank's coordinate on `axis`."""
        return self.coordinates[axis]

    @property
    def reports(self) -> bool:
        """Whether this rank speaks for its tensor group, whose ranks compute the same figures."""
        return self.at("tensor") == 0

    def sum_over_world(self, *figures: torch.Tensor) -> list[float]:
        """Scalars summed over all ranks in one reduction, in float64."""
        together = torch.stack([figure.double() for figure in figures])
        self.group("world").all_reduce(together)
        return together.tolist()

    def messages(self, gradients: bool, source: int, destination: int) -> Group:
        """The group in which a rank of the pipeline sends another activations, or gradients: one for each kind and direction.

        Some backends (NCCL) do what two ranks send each other in one group one after the other, and a send is not over before it
        is received: with both directions in one group, each would wait with a send for the other's receive behind it.
        """
        return self.group(message_group(gradients, source, destination))

    @property
    def stages(self) -> list[int]:
        """The stages that this rank holds, in the order of the model."""
        return self.placement.stages_of(self.at("pipeline"))

    @property
    def first_stage(self) -> bool:
        """Whether this rank holds it."""
        return self.stages[0] == 0

    @property
    def last_stage(self) -> bool:
        """Whether this rank holds it."""
        return self.stages[-1] == self.placement.stages - 1


def _say_hello(mesh: Mesh, communicator: Communicator) -> None:
    """One element over every connection of the pipeline, one after the other. Some backends (NCCL) connect two ranks at their first
    message and make both wait for it; a schedule's first messages come in an order in which ranks would wait for each other."""
    here, hello = mesh.at("pipeline"), torch.zeros(1, device=communicator.device)
    for gradients, source, destination in _connections(mesh.placement):
        if source == here:
            mesh.messages(gradients, source, destination).send(hello, destination)
        elif destination == here:
            mesh.messages(gradients, source, destination).receive(hello, source)


def _connections(placement: Placement) -> list[tuple[bool, int, int]]:
    """(gradients or activations, from, to) of every pair of ranks that send each other any."""
    found: dict[tuple[bool, int, int], None] = {}
    for stage in range(placement.stages):
        for gradients, step in ((False, 1), (True, -1)):
            destination = placement.neighbour(stage, step)
            if destination is not None:
                found[gradients, placement.rank_of(stage), destination] = None
    return list(found)


_RETURNING = ("pipeline_return", "pipeline_back_return")


def message_group(gradients: bool, source: int, destination: int) -> str:
    """Activations go to a later rank and gradients to an earlier one, except where stages go round or there and back again."""
    returning = (destination > source) if gradients else (destination < source)
    return ("pipeline_back" if gradients else "pipeline") + ("_return" if returning else "")

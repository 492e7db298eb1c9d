"""The groups of one rank, by axis name, all derived from the layout."""

from dataclasses import dataclass

import torch

from bagualu.comm.group import Communicator, Group
from bagualu.comm.monitor import Monitor
from bagualu.parallel.layout import Layout


@dataclass(frozen=True)
class Mesh:
    """One rank's view of the layout.

    Groups: tensor, pipeline (activations go down it), pipeline_back (gradients come up it, so that neither direction waits
    for the other), fold (holders of the same dense parameters), expert (holders of the other experts), replica (holders of
    the same experts), ends (the first and the last stage, for tied embeddings; absent in between) and world.
    """

    layout: Layout
    coordinates: dict[str, int]
    groups: dict[str, Group]

    @staticmethod
    def build(layout: Layout, communicator: Communicator) -> "Mesh":
        """Called by every rank; `layout.world` ranks in all."""
        rank = communicator.rank
        at = layout.coordinates(rank)
        groups = {"world": communicator.world}
        for axis in ("tensor", "fold", "expert", "replica", "pipeline"):
            groups[axis] = communicator.group(layout.peers(axis, rank), axis)
        stages = layout.peers("pipeline", rank)
        groups["pipeline_back"] = communicator.group(stages, "pipeline_back")
        if at["pipeline"] in (0, layout.pipeline - 1):
            ends = stages if layout.pipeline == 1 else (stages[0], stages[-1])
            groups["ends"] = communicator.group(ends, "ends")
        mesh = Mesh(layout, at, groups)
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

    @property
    def first_stage(self) -> bool:
        return self.at("pipeline") == 0

    @property
    def last_stage(self) -> bool:
        return self.at("pipeline") == self.layout.pipeline - 1


def _say_hello(mesh: Mesh, communicator: Communicator) -> None:
    """One element down the pipeline and one up. Some backends (NCCL) connect two ranks at their first message and make both wait
    for it; a schedule's first messages come in an order in which stages would wait for each other."""
    stage, last, hello = mesh.at("pipeline"), mesh.layout.pipeline - 1, torch.zeros(1, device=communicator.device)
    if stage > 0:
        mesh.group("pipeline").receive(hello, stage - 1)
    if stage < last:
        mesh.group("pipeline").send(hello, stage + 1)
        mesh.group("pipeline_back").receive(hello, stage + 1)
    if stage > 0:
        mesh.group("pipeline_back").send(hello, stage - 1)

"""The groups of one rank, by axis name, all derived from the layout."""

from dataclasses import dataclass

from bagualu.comm.group import Communicator, Group
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
        return Mesh(layout, at, groups)

    def group(self, axis: str) -> Group:
        return self.groups[axis]

    def at(self, axis: str) -> int:
        """This rank's coordinate on `axis`."""
        return self.coordinates[axis]

    @property
    def first_stage(self) -> bool:
        return self.at("pipeline") == 0

    @property
    def last_stage(self) -> bool:
        return self.at("pipeline") == self.layout.pipeline - 1

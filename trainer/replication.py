"""The run's state in its nodes' memory: when it is put there, and what a run goes on from after a restart."""

import hashlib
import json
import logging
from dataclasses import dataclass
from pathlib import Path

from bagualu.comm.errors import RecipeError
from bagualu.fault_tolerance.checkpoint.format import CheckpointError
from bagualu.fault_tolerance.replica.replicas import Replicas
from bagualu.trainer.assemble import Parts
from bagualu.trainer.state import identity, metadata_of

log = logging.getLogger(__name__)


@dataclass
class Replication:
    """`checkpoint.replica_every` carried out. Every method is collective."""

    parts: Parts
    replicas: Replicas

    def newer_than(self, step: int) -> tuple[int, Path] | None:
        """The newest replica that is whole and not older than `step`: steps done, and where this rank can read it.

        Those that are not are told of and passed over.
        """
        for replica in self.replicas.candidates():
            if replica.step >= step:
                try:
                    return replica.step, replica.fetch(self.parts.optimizer.reads())
                except CheckpointError as error:
                    if self.parts.mesh.at("world") == 0:
                        log.warning("%s; taking the one before", error)
        return None

    def after_step(self, step: int) -> None:
        """Keep the state after `step` steps, if it is time to."""
        if step % self.parts.recipe.checkpoint.replica_every == 0:
            self.replicas.keep(step, self.parts.optimizer.pieces(), metadata_of(self.parts, step))


def open_replication(parts: Parts, scratch: Path | None) -> Replication | None:
    """What keeps replicas of this run in `scratch`; None where the recipe asks for none. Collective. Raises RecipeError."""
    if not parts.recipe.checkpoint.replica_every:
        return None
    if scratch is None:
        raise RecipeError("checkpoint.replica_every needs memory that outlives a worker, which torchrun does not offer; start with "
                          "`bagualu train` or `bagualu slurm`, or give checkpoint.replica_every=0")  # fmt: skip
    replicas = Replicas(scratch, _run(parts), parts.mesh.group("world"), parts.device)
    replicas.check_room(sum(piece.tensor.nbytes for piece in parts.optimizer.pieces()))
    return Replication(parts, replicas)


def _run(parts: Parts) -> str:
    """The same for all starts of one run, on every rank and layout, and no other's."""
    own = json.dumps([str(Path(parts.recipe.run.dir).absolute()), identity(parts)], sort_keys=True)
    return hashlib.blake2b(own.encode(), digest_size=16).hexdigest()

"""Keeps replicas of the run's state in its nodes' memory, and offers them as candidates to resume from after a restart."""

import hashlib
import json
import sys
from dataclasses import dataclass
from pathlib import Path

from bagualu.comm.errors import RecipeError
from bagualu.fault_tolerance.checkpoint.reading.load import Checkpoint
from bagualu.fault_tolerance.checkpoint.saving.fence import Fence
from bagualu.fault_tolerance.replica.recover import Replica, replica_name
from bagualu.fault_tolerance.replica.replicas import Replicas
from bagualu.trainer.assemble import TrainerState
from bagualu.trainer.recovery.resume import Resumed
from bagualu.trainer.recovery.state import finite_pieces, identity, metadata_of


@dataclass(frozen=True)
class Kept:
    """A replica as a candidate to resume from (see `resume.Candidate`)."""

    state: TrainerState
    replica: Replica

    @property
    def step(self) -> int:
        return self.replica.step

    @property
    def name(self) -> str:
        return self.replica.name

    def open(self) -> Checkpoint:
        """Fetches what this rank needs of the replica from the nodes that hold it, and opens it as a checkpoint in this node's
        memory.

        Collective. Raises CheckpointError."""
        return Checkpoint(self.replica.fetch((piece.name, piece.box) for piece in self.state.engine.incoming().pieces()))


@dataclass
class Replication:
    """Keeps replicas as `checkpoint.replica_every` asks. Every method is collective."""

    state: TrainerState
    replicas: Replicas

    def candidates(self) -> list["Kept"]:
        """Returns the replicas from which the run may resume, newest first; [] if the recipe does not ask to resume."""
        replicas = self.replicas.candidates() if self.state.recipe.checkpoint.resume else []
        return [Kept(self.state, replica) for replica in replicas]

    def start(self, resumed: Resumed) -> None:
        """Starts replication after the run has resumed. If it resumed from a replica, removes the replicas of later steps, else
        all."""
        from_memory = resumed.source == replica_name(resumed.step)
        self.replicas.start(resumed.step if from_memory else None)
        if from_memory and self.state.mesh.at("world") == 0:
            print(f"going on from {resumed.source}", file=sys.stderr, flush=True)

    def go_back(self, step: int) -> None:
        """Removes the replicas of steps after `step`, because the run has gone back to the state after `step` steps."""
        self.replicas.forget_after(step)

    def after_step(self, step: int) -> None:
        """Keeps the state after `step` steps if `step` is a multiple of checkpoint.replica_every."""
        if step % self.state.recipe.checkpoint.replica_every == 0:
            self.replicas.keep(step, finite_pieces(self.state.engine.pieces()), metadata_of(self.state, step))


def open_replication(state: TrainerState, scratch: Path | None, fence: Fence) -> Replication | None:
    """Returns the Replication that keeps replicas of this run in `scratch`; None if the recipe asks for none. Collective. Raises
    RecipeError if there is no `scratch` or too little memory for replicas."""
    if not state.recipe.checkpoint.replica_every:
        return None
    if scratch is None:
        raise RecipeError("checkpoint.replica_every needs memory that outlives a worker, which torchrun does not offer; start with "
                          "`bagualu train` or `bagualu slurm`, or give checkpoint.replica_every=0")  # fmt: skip
    replicas = Replicas(scratch, _run(state), f"{fence.epoch:08d}-{fence.token}", state.mesh.group("world"))
    replicas.check_room(sum(piece.tensor.nbytes for piece in state.engine.pieces()))
    return Replication(state, replicas)


def _run(state: TrainerState) -> str:
    """Returns an identifier of the run: the same for all its starts, ranks and layouts, and different for other runs."""
    own = json.dumps([str(Path(state.recipe.run.dir).absolute()), identity(state)], sort_keys=True)
    return hashlib.blake2b(own.encode(), digest_size=16).hexdigest()

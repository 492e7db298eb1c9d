"""Sets up the observers of a rank's monitor: the ledger on rank 0, and the faults planned for this rank."""

import secrets
from pathlib import Path
from typing import Any

from bagualu.comm.group import Communicator
from bagualu.comm.objects import broadcast_json
from bagualu.fault_tolerance.injection.fault_target import RankScene
from bagualu.fault_tolerance.injection.observer import PlannedFaults
from bagualu.fault_tolerance.injection.record import Record
from bagualu.fault_tolerance.ledger.events import Ledger, read
from bagualu.fault_tolerance.ledger.observer import LedgerObserver
from bagualu.fault_tolerance.ledger.totals import attribute
from bagualu.fault_tolerance.replica.node_folder import REPLICAS
from bagualu.fault_tolerance.run_directory import RunDirectory
from bagualu.trainer.assemble import TrainerState
from bagualu.trainer.recipe.config import Recipe


def open_ledger(recipe: Recipe, communicator: Communicator) -> Ledger | None:
    """Starts to record in ledger.jsonl what rank 0 does, and returns its ledger; does nothing and returns None on other ranks."""
    if communicator.rank:
        return None
    ledger = Ledger(Path(recipe.run.dir), writer=secrets.token_hex(4))
    ledger.add("joined", engine=recipe.parallel.engine_text)
    communicator.monitor.observers.append(LedgerObserver(ledger))
    return ledger


def close_ledger(ledger: Ledger | None, recipe: Recipe, communicator: Communicator, ended: str) -> dict[str, Any]:
    """Writes on rank 0 the ledger's "ended" event with the cause `ended` (done or stopped). Returns the summary fields on where the
    run's time went, the same on every rank. Collective."""
    totals: dict[str, Any] = {}
    if ledger is not None:
        ledger.add("ended", cause=ended)
        ledger.close()
        totals = attribute(read(Path(recipe.run.dir)))
    totals = broadcast_json(totals if communicator.rank == 0 else None, communicator.world)
    return {"effective_training_time_ratio": totals.pop("effective_training_time_ratio"), "ledger": totals}


def plan_faults(state: TrainerState, communicator: Communicator, scratch: Path | None) -> None:
    """Makes the faults planned for this rank strike at their steps. `scratch`: the folder that holds replicas; None if there is
    none."""
    run_dir = RunDirectory(state.recipe.run.dir)
    plan = state.recipe.planned_faults(max(communicator.size, state.recipe.world_size()))
    if plan:
        replicas = scratch / REPLICAS if scratch else None
        scene = RankScene(communicator, lambda: state.engine.leaves(), lambda: state.engine.pieces(), run_dir.checkpoints, replicas)
        communicator.monitor.observers.append(PlannedFaults(plan, scene, Record(run_dir.faults)))

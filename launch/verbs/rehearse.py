"""`bagualu rehearse`: runs a recipe under planned faults and reports which faults it survived and what they cost."""

import sys
from contextlib import suppress
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from bagualu.comm import jsonl
from bagualu.comm.errors import RecipeError
from bagualu.fault_tolerance.checkpoint.layout.directory import latest
from bagualu.fault_tolerance.checkpoint.layout.quarantine import list_set_aside
from bagualu.fault_tolerance.config import RestartConfig
from bagualu.fault_tolerance.injection.plan import EXAMPLE, parse
from bagualu.fault_tolerance.injection.record import Record
from bagualu.fault_tolerance.injection.report import NO_EFFECT, SURVIVED, UNNOTICED, Trace, outcomes
from bagualu.fault_tolerance.ledger.events import read
from bagualu.fault_tolerance.ledger.totals import CATEGORIES, attribute, current
from bagualu.fault_tolerance.run_directory import RunDirectory
from bagualu.launch.verbs.command_line import SEVERAL, CommandLine
from bagualu.launch.workers import storage_probe
from bagualu.launch.workers.run import run
from bagualu.trainer.costs.fits import check_memory, device_of
from bagualu.trainer.operators.choice import ChosenOperators
from bagualu.trainer.operators.config import OperatorsConfig
from bagualu.trainer.process.failure import DONE, FAILED, STOPPED
from bagualu.trainer.process.stop_request import StopRequest
from bagualu.trainer.recipe import preflight
from bagualu.trainer.recipe.compose import compose
from bagualu.trainer.recipe.config import Recipe

_WIDTH = 120
"""The least width of the printed table of faults, in columns."""
_NUMBERS = ("step", "recovery", "steps lost")


def rehearse(request: CommandLine, entrypoint: str | None) -> tuple[int, Any]:
    """Run the rehearsal. Returns the exit code and the object that --json prints.

    The exit code is 0 only if the run reached its last step, every fault was survived or took no effect, and (without --no-compare)
    the final state equals that of a run without faults, which leaves out the same samples. It is STOPPED after a request to stop.
    """
    recipe = compose(request.overrides, SEVERAL[request.verb])
    recipe.run.validate()  # before folders are derived from run.dir
    if recipe.launch.nodes > 1:
        raise RecipeError(f"launch.nodes={recipe.launch.nodes}: a rehearsal runs on this machine only; give launch.nodes=1")
    workers = preflight.workers_per_node(recipe)
    recipe, chosen = storage_probe.settle(recipe, workers)
    faults = [str(fault) for fault in recipe.planned_faults(workers)]
    if not faults:
        raise RecipeError(f"bagualu rehearse needs faults; give e.g. {EXAMPLE}, or faults=random:5")
    folder = preflight.free(Path(f"{recipe.run.dir}-rehearsal"))
    restart = _budget(recipe.restart, faults, request.overrides)
    rehearsed = _in(folder / "rehearsed", replace(recipe, faults=faults, restart=restart))
    preflight.check(rehearsed, rehearsed.world_size())
    preflight.check_machine(rehearsed)
    check_memory(rehearsed, rehearsed.world_size(), device_of(rehearsed, workers))
    stop = StopRequest()
    code, summary = _run(rehearsed, chosen, workers, entrypoint, stop)
    reference, left_out = None, []
    if request.compare and code == DONE:
        left_out = sorted(set(summary["guard"]["skipped_steps"]) - set(recipe.guard.leave_out))
        guard = replace(recipe.guard, leave_out=[*recipe.guard.leave_out, *left_out])
        recipe = replace(recipe, operators=_operators_of(rehearsed))
        reference = _in(folder / "uninterrupted", replace(recipe, faults=[], guard=guard))
        code, ended = _run(reference, chosen, workers, entrypoint, stop)
        if code != DONE:
            return code, ended
    document = _document(rehearsed, summary, reference) | {"left_out": left_out}
    if not request.json:
        _show(document)
    if code == STOPPED:
        return STOPPED, document
    return DONE if document["as_promised"] else FAILED, document


def _run(recipe: Recipe, chosen: str, workers: int, entrypoint: str | None, stop: StopRequest) -> tuple[int, Any]:
    print(f"bagualu: {recipe.run.dir}, {len(recipe.faults)} faults planned ({recipe.parallel.engine_text}), with {chosen}",
          file=sys.stderr, flush=True)  # fmt: skip
    return run(recipe, workers, entrypoint, quiet_stdout=True, stop=stop)


def _in(folder: Path, recipe: Recipe) -> Recipe:
    """Returns the recipe with run.dir=`folder` and checkpoint.resume=false, so that the run starts there from step 0."""
    return replace(
        recipe, run=replace(recipe.run, dir=str(folder)), checkpoint=replace(recipe.checkpoint, resume=False)
    )  # fmt: skip


def _operators_of(recipe: Recipe) -> OperatorsConfig:
    """Returns the variants of operators with which the run of `recipe` has computed."""
    with suppress(OSError, ValueError):
        if recorded := ChosenOperators.read(RunDirectory(recipe.run.dir).operators):
            return recorded.as_config()
    return recipe.operators


def _budget(restart: RestartConfig, faults: list[str], overrides: list[str]) -> RestartConfig:
    """Returns `restart` with a further restart for each fault that ends a process, and without pauses before restarts. A key that
    is in `overrides` keeps its value."""
    typed = {text.split("=")[0] for text in overrides}
    restarts = sum(parse(fault).ends_process for fault in faults)
    changes: dict[str, Any] = {"limit": restart.limit + restarts, "backoff_seconds": 0.0}
    return replace(restart, **{key: value for key, value in changes.items() if f"restart.{key}" not in typed})


def _document(rehearsed: Recipe, summary: dict[str, Any], reference: Recipe | None) -> dict[str, Any]:
    folder = Path(rehearsed.run.dir)
    events = current(read(folder))
    metrics = [line for line in jsonl.read(RunDirectory(folder).metrics) if type(line.get("step")) is int]
    damaged = [path.name for path in list_set_aside(RunDirectory(folder).checkpoints)]
    rows = outcomes(rehearsed.faults, Trace(Record(RunDirectory(folder).faults).strikes(), events, metrics, damaged))
    done = summary["ended"] == "done"
    document = {
        "ended": summary["ended"],
        "run_dir": str(folder),
        "faults": [asdict(row) for row in rows],
        "survived": sum(row.state == SURVIVED for row in rows),
        "without_effect": sum(row.state == NO_EFFECT for row in rows),
        "planned": len(rows),
        "ledger": attribute(events),
    }
    if not done:
        document["cause"] = summary.get("cause")
    differing = _differences(rehearsed, reference) if reference and done else None
    if differing is not None:
        document |= {"equal": not differing, "differences": differing, "reference": reference.run.dir if reference else None}
    document["as_promised"] = done and not differing and all(row.state in (SURVIVED, NO_EFFECT) for row in rows)
    return document


def _differences(rehearsed: Recipe, reference: Recipe) -> list[str]:
    """Returns the differences between the newest checkpoints of two finished runs, a line for each; [] if they are equal."""
    from bagualu.fault_tolerance.checkpoint.reading.compare import differences  # imports torch, as the runs have done

    ends = [latest(RunDirectory(recipe.run.dir).checkpoints) for recipe in (rehearsed, reference)]
    assert ends[0] is not None
    assert ends[1] is not None
    return differences(ends[0], ends[1])


def _show(document: dict[str, Any]) -> None:
    table = Table(box=SIMPLE_HEAD)
    for name in ("fault", "step", "outcome", "recovery", "steps lost"):
        table.add_column(name, no_wrap=name == "fault", overflow="fold", justify="right" if name in _NUMBERS else "left")
    for row in document["faults"]:
        struck = "never" if row["struck_at"] is None else str(row["struck_at"])
        noticed = "" if row["noticed"] == UNNOTICED else row["noticed"]
        state = "" if row["state"] == SURVIVED else row["state"].upper()
        lines = "\n".join(filter(None, (row["did"], noticed, row["answered"], state)))
        recovery = "" if row["recovery_seconds"] is None else f"{row['recovery_seconds']:.1f} s"
        lost = "" if row["steps_lost"] is None else str(row["steps_lost"])
        table.add_row(row["fault"], struck, lines, recovery, lost)
    console = Console()
    console.width = max(console.width, _WIDTH)
    console.print(table)
    counts = f"survived {document['survived']} of {document['planned']} faults"
    if document["without_effect"]:
        counts += f", {document['without_effect']} took no effect"
    print(f"{document['run_dir']}: {counts}; the run ended: {document['ended']}")
    if "equal" in document:
        differing = document["differences"]
        other = "the uninterrupted run"
        if left_out := document["left_out"]:
            steps = ",".join(map(str, left_out))
            typed = f"guard.leave_out=[{steps}]"
            print(f"the guard left out the samples of steps {steps}, as its policy says, so the final state is compared with "
                  f"that of a run with {typed}:")  # fmt: skip
            other += f" of {typed}"
        more = f" and {len(differing) - 1} more" if len(differing) > 1 else ""
        print(f"final state equal to {other}, bit for bit" if not differing
              else f"final state differs from {other}: {differing[0]}{more}")  # fmt: skip
    ledger = document["ledger"]
    print(
        "wall time",
        f"{ledger['wall']:.1f} s:",
        ", ".join(f"{name} {ledger[name]:.1f} s" for name in CATEGORIES if ledger[name] >= 0.05),
    )

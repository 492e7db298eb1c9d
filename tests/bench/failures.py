"""The effective training time to expect at 16,384 and at about 100,000 devices, and which mechanism gives how much of it.

    python -m tests.bench.failures                    # with the figures of docs/performance.md
    python -m tests.bench.failures --measure          # with times measured here first, by a rehearsal and recovery.py

The job is Llama 3 405B as published: replicas of 128 devices (tensor 8 x pipeline 16), 16 sequences each in a step, 400 TFLOP/s a
device. Failures come as often as its 419 unexpected interruptions in 54 days (recipes/cluster/h100.yaml), restarts take what ours
were measured to take, and the bytes of its state go to the storage that the cluster's file describes.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from bagualu.comm.cluster_file import load_cluster
from bagualu.fault_tolerance.config import CheckpointConfig, GuardConfig, RestartConfig
from bagualu.fault_tolerance.forecast.assumptions import Assumptions
from bagualu.fault_tolerance.forecast.forecast import EffectiveTime, Settings, Workload, forecast, run_model
from bagualu.fault_tolerance.forecast.interval import best_interval
from bagualu.fault_tolerance.forecast.report import FailureReport, report_on
from bagualu.fault_tolerance.forecast.run_model import RunModel

DAYS = 54
PARAMETERS = 405e9
REPLICA = 128
"""Devices of a replica: tensor 8 x pipeline 16 (Llama 3, table 4)."""
SEQUENCES, SEQUENCE_LENGTH = 16, 8192
FLOPS_PER_SECOND = 400e12
"""Of a device, with 16,384 of them (Llama 3, table 4)."""
STATE_BYTES_PER_PARAMETER = 12
"""Float32 master weights and two moments: what a checkpoint of ours holds."""


@dataclass(frozen=True)
class Scenario:
    """A size of the job, and how often it fails."""

    name: str
    world: int
    failure_factor: float
    """Times the rates of recipes/cluster/h100.yaml."""
    spares: int
    """Nodes that stand by where the table says so: more than are under repair on average (7, 40, 98)."""
    published: str


META = "Meta, O(100K) GPUs: 44% with a stall of 10 min for each failure, 80% with 3 min (arXiv 2602.00277)"
SCENARIOS = (
    Scenario("16,384 devices", 16_384, 1.0, 16, "Llama 3 405B, 54 days: above 90% (arXiv 2407.21783)"),
    Scenario("98,304 devices", 98_304, 1.0, 64, META),
    # exp(-10 / 12.2) = 44% and exp(-3 / 13.4) = 80%: of failures that strike stalls too. 30.9 / 12.8 = 2.4 times as many as above.
    Scenario("98,304 devices, a failure every 12.8 min", 98_304, 2.41, 128, META + "; the rate is the one that both figures imply"),
)


@dataclass(frozen=True)
class Mechanism:
    """A row of the table: what is different from the row above it, or from the recipe's defaults."""

    title: str
    model: RunModel
    search: bool = True
    """Whether checkpoint.every is the best, instead of the default of 100 steps."""


def work(world: int) -> Workload:
    tokens = SEQUENCES * SEQUENCE_LENGTH
    seconds = 6 * PARAMETERS * tokens / (REPLICA * FLOPS_PER_SECOND)
    return Workload(world, seconds, STATE_BYTES_PER_PARAMETER * PARAMETERS, world // REPLICA, SEQUENCES)


def modelled(
    world: int, assumptions: Assumptions, spares: int | None = None, rejoin: bool = True, equal_shares: bool = True, **given: Any
) -> RunModel:  # fmt: skip
    """Returns the model of the job; `given` are keys of checkpoint.* and restart.*."""
    restart = RestartConfig(**{key: given.pop(key) for key in list(given) if hasattr(RestartConfig(), key)})
    settings = Settings(CheckpointConfig(**given), restart, GuardConfig())
    job = replace(work(world), equal_shares=equal_shares)
    return run_model(load_cluster("h100"), job, settings, assumptions, spares, rejoin)


def mechanisms(scenario: Scenario, assumptions: Assumptions) -> Iterator[Mechanism]:
    def model(assumed: Assumptions = assumptions, **given: Any) -> RunModel:
        return modelled(scenario.world, assumed, **given)

    yield Mechanism("defaults: checkpoint.every=100, written in the background", model(), search=False)
    yield Mechanism("checkpoint.async=false: training waits until they are written", model(asynchronous=False), search=False)
    yield Mechanism("**checkpoint.every as searched**, here and in all rows below", model())
    yield Mechanism("no watchdog: hangs end after comm.timeout_seconds=600", model(hang_seconds=0.0, long_hang_seconds=0.0))
    yield Mechanism("restart.hang_seconds=60", model(hang_seconds=60.0))
    steady = {"backoff_seconds": 0.0}
    yield Mechanism("**restart.backoff_seconds=0**, here and in all rows below", model(**steady))
    yield Mechanism("checkpoint.every=100, but checkpoint.replica_every=5", model(replica_every=5, **steady), search=False)
    yield Mechanism("no spare nodes: waits for repairs", model(spares=0, **steady))
    yield Mechanism("spare nodes", model(spares=scenario.spares, **steady))
    elastic = {"elastic": True, "wait_seconds": 10, **steady}
    yield Mechanism("restart.elastic=true, no spare nodes, nodes rejoin at once", model(spares=0, **elastic))
    uneven = {"equal_shares": False, **elastic}
    yield Mechanism("the same, parallel.shares=measured", model(spares=0, **uneven))
    yield Mechanism("the same, nodes rejoin at the next failure", model(spares=0, rejoin=False, **uneven))
    later = {"spares": scenario.spares, "rejoin": False, **elastic}
    yield Mechanism("restart.elastic=true, spare nodes, nodes rejoin at the next failure", model(**later))
    quick = replace(assumptions, connect_seconds_per_device=24 / 96_000)
    yield Mechanism("the same, ranks connect in 24 s for 96,000 (NCCLX)", model(quick, **later))


def row(mechanism: Mechanism, runs: int) -> dict[str, Any]:
    model, seconds = mechanism.model, DAYS * 86400.0
    if mechanism.search and (best := best_interval(model, seconds, runs, seed=0)):
        model = replace(model, checkpoint_steps=best.steps)
    return {"mechanism": mechanism.title, "checkpoint.every": model.checkpoint_steps, **figures(forecast(model, seconds, runs))}


def figures(time: EffectiveTime) -> dict[str, Any]:
    return {
        "ratio": time.ratio.mean, "low": time.ratio.low, "high": time.ratio.high, "mean_error": time.ratio.mean_error,
        "progress": time.progress.mean, "failures": time.failures.mean,
        "shares": {name: seconds / time.seconds for name, seconds in time.categories.items()},
    }  # fmt: skip


def measured() -> dict[str, float]:
    """Returns assumptions measured on this machine, by a rehearsal of two kills and by the recovery bench."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        rehearsal = output(
            "-c", "import sys; from bagualu.launch.cli import main; sys.exit(main())", "rehearse", "recipe=tiny", "train.steps=40",
            "checkpoint.every=5", "faults=[kill@step=12:rank=2, kill@step=24]", f"run.dir={folder}/tiny", "--json", "--no-compare",
        )  # fmt: skip
        ledger = json.loads(rehearsal)["ledger"]
        recovery = bench(folder, "--rounds", "3")
        replication = bench(folder, "--replication")
    pause = RestartConfig().backoff_seconds
    return {
        "exit_seconds": ledger["detection"] / ledger["restarts"],
        "workers_seconds": max(0.0, median([row["processes up"] for row in recovery]) - pause),
        "resume_seconds": median([row["state back"] for row in recovery]),
        "replica_bytes_per_second": 1e6 * min(row["MB/s"] for row in replication if row["nodes"] == 2) / 2,  # of one of two ranks
    }


def bench(folder: Path, *arguments: str) -> list[dict[str, Any]]:
    target = folder / "rows.json"
    output("-m", "tests.bench.recovery", *arguments, "--json", str(target))
    found: list[dict[str, Any]] = json.loads(target.read_text())
    return found


def output(*arguments: str) -> str:
    return subprocess.run([sys.executable, *arguments], check=True, stdout=subprocess.PIPE, text=True).stdout


def median(values: list[float]) -> float:
    return sorted(values)[len(values) // 2]


def table(scenarios: list[dict[str, Any]]) -> str:
    """Returns a row for each mechanism, and in each scenario its effective training time and, if that is less, its progress."""
    lines = ["| | " + " | ".join(scenario["name"] for scenario in scenarios) + " |", "|" + "---|" * (1 + len(scenarios))]
    for rows in zip(*(scenario["mechanisms"] for scenario in scenarios), strict=True):
        lines.append(f"| {rows[0]['mechanism']} | " + " | ".join(map(cell, rows)) + " |")
    return "\n".join(lines)


def cell(row: dict[str, Any]) -> str:
    progress = f", progress {row['progress']:.1%}" if row["ratio"] - row["progress"] > 0.0005 else ""
    return f"{row['ratio']:.1%} ({row['low']:.1%} to {row['high']:.1%}){progress}"


def influence_table(report: FailureReport) -> str:
    lines = ["| assumption | value | range | progress | elasticity of what is lost | source |", "|---|---|---|---|---|---|"]
    sources = report.document()["assumptions"]
    for row in report.influences:
        lines.append(f"| {row.name} | {row.value:.3g} | {row.low:.3g} to {row.high:.3g} | {row.progress_at_low:.1%} to "
                     f"{row.progress_at_high:.1%} | {row.elasticity:+.2f} | {sources[row.name]['source']} |")  # fmt: skip
    return "\n".join(lines)


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--measure", action="store_true", help="measure detection, start and replicas here first")
    parser.add_argument("--runs", type=int, default=100, help="simulated runs of each row (default 100)")
    parser.add_argument("--json", type=Path, metavar="FILE")
    options = parser.parse_args(argv)
    here = measured() if options.measure else {}
    assumptions = Assumptions().changed(here)
    if here:
        print("measured here: " + ", ".join(f"{name}={value:.3g}" for name, value in here.items()))
    scenarios = []
    for scenario in SCENARIOS:
        assumed = replace(assumptions, failure_factor=scenario.failure_factor)
        world = scenario.world
        report = report_on(
            lambda changed, world=world: modelled(world, changed), assumed, DAYS * 86400.0, RestartConfig().limit, options.runs, 100
        )
        print(f"\n{scenario.name}, {DAYS} days\n" + "\n".join(f"  {line}" for line in report.lines()))
        print(f"  published: {scenario.published}\n\n{influence_table(report)}")
        rows = [row(mechanism, options.runs) for mechanism in mechanisms(scenario, assumed)]
        scenarios.append({**asdict(scenario), **report.document(), "mechanisms": rows})
    print("\n" + table(scenarios))
    if options.json:
        options.json.write_text(json.dumps({"measured": here, "scenarios": scenarios}, indent=2, allow_nan=False))


if __name__ == "__main__":
    main(sys.argv[1:])

"""Predicted against measured step time on this machine: bench_dense and bench_moe, on one and two processes, each axis, each
schedule; on a GPU, bench_dense_1b and bench_moe_2b in one process.

    python tests/bench/this_machine.py                     # runs bagualu doctor, predicts with cluster=this, measures, compares
    python tests/bench/this_machine.py --quick             # a few cases, one round
    python tests/bench/this_machine.py --device cuda       # on an NVIDIA GPU
    python tests/bench/this_machine.py operators           # times of one step, operator by operator, against those predicted

Cases take turns (A B A B ...), each in a fresh `bagualu train`, as users start it. Nothing is fitted to them: doctor measures
products of other shapes and operators of other models; on a GPU, products and copies alone. The exit code is 1 if a case fails.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from contest.bagualu import Bagualu
from contest.bagualu import overrides as overrides_of
from contest.entry import Entry, parse
from contest.environment import environment, machine, versions
from contest.report import spread, table_of
from throughput import cores

from bagualu.comm.cluster_file import load_cluster
from bagualu.comm.topology import Cluster
from bagualu.parallel.pipeline.registry import SCHEDULES
from bagualu.parallel.simulation.operator_cost import operator_seconds
from bagualu.trainer.recipe.compose import compose
from bagualu.trainer.simulation.predict import predict
from bagualu.trainer.simulation.timed import operator_times

RECIPES = {"cpu": ("bench_dense", "bench_moe"), "cuda": ("bench_dense_1b", "bench_moe_2b")}
ON_GPU = ("bagualu",)
AXES = ("bagualu", "bagualu-data", "bagualu-tensor", "bagualu-native3", "bagualu-expert")
QUICK = ("bagualu", "bagualu-data", "bagualu-1f1b")
WITHIN = {"cpu": 0.12, "cuda": 0.10}
"""The largest fraction by which a prediction should be off."""
SAME_SPLIT = ("parallel.balance=uniform",)
"""So that the run and its prediction have the same stages: by measured costs they would depend on the moment."""


@dataclass(frozen=True)
class Case:
    recipe: str
    entry: Entry
    device: str = "cpu"

    def runner(self, warmup: int, folder: Path) -> Bagualu:
        return Bagualu(self.entry, self.recipe, "tuned", warmup, folder, self.device, [])

    def predicted_words(self) -> list[str]:
        """Returns the overrides with which the case runs: its own, and those of its device."""
        return [*self.words(), *self.runner(0, Path()).extra]

    def words(self) -> list[str]:
        words = [word for word in overrides_of(self.entry, self.recipe) if not word.startswith("parallel.balance=")]
        return [f"recipe={self.recipe}", *words, *(SAME_SPLIT if self.entry.axis == "pipeline" else ())]


def arguments(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="?", choices=("steps", "operators"), default="steps")
    parser.add_argument("--device", choices=tuple(RECIPES), default="cpu", help="cuda: one process on an NVIDIA GPU")
    parser.add_argument("--recipes", nargs="+", metavar="RECIPE", help="default: those of the device")
    parser.add_argument("--entries", nargs="+", metavar="NAME", help="as in throughput.py (default: each axis, each schedule)")
    parser.add_argument("--rounds", type=int, default=3, help="times every case gets its turn (default 3)")
    parser.add_argument("--steps", type=int, default=4, help="timed steps per turn (default 4)")
    parser.add_argument(
        "--warmup", type=int, default=6, help="untimed steps of each turn (default 6: until freed memory is reused)"
    )
    parser.add_argument("--quick", action="store_true", help=f"one round of {', '.join(QUICK)}, with bagualu doctor --quick")
    parser.add_argument("--cluster", type=Path, metavar="FILE", help="predict with this file in place of running bagualu doctor")
    parser.add_argument("--predict-only", action="store_true", help="measure no steps")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write machine, versions and every sample here")
    options = parser.parse_args(argv)
    options.recipes = options.recipes or RECIPES[options.device]
    if unknown := sorted(set(options.recipes) - set(RECIPES[options.device])):
        parser.error(f"{unknown[0]} is not measured on {options.device}; give --recipes {' '.join(RECIPES[options.device])}")
    if options.quick:
        options.rounds, options.entries = 1, options.entries or QUICK
    if options.device == "cuda":
        options.entries = ON_GPU
        if options.what == "operators":
            parser.error(
                "operators are timed on a CPU, which runs them one after the other; tests/bench/gpu.py lists a GPU's kernels"
            )
    return options


def cases(options: argparse.Namespace) -> list[Case]:
    names = options.entries or [*AXES, *(f"bagualu-{schedule}" for schedule in SCHEDULES)]
    entries = [parse(name, cores()) for name in names]
    dense = [entry for entry in entries if entry.axis != "expert"]
    mixtures = ("bench_moe", "bench_moe_2b")
    return [
        Case(recipe, entry, options.device) for recipe in options.recipes for entry in (entries if recipe in mixtures else dense)
    ]


def measured_cluster(options: argparse.Namespace, folder: Path) -> Cluster:
    """Returns cluster=this, measured now unless a file is given."""
    if options.cluster:
        return load_cluster(str(options.cluster))
    words = ["comm.backend=nccl", "launch.workers=1"] if options.device == "cuda" else ["comm.backend=gloo"]
    command = [sys.executable, "-m", "bagualu.launch.cli", "doctor", f"data.cache={folder}", *words]
    subprocess.run([*command, *(["--quick"] if options.quick else [])], check=True, stdout=sys.stderr)
    return load_cluster("this", [folder])


def predicted(case: Case, cluster: Cluster) -> Any:
    return predict(compose(case.predicted_words()), cluster, case.entry.processes)


def compare(options: argparse.Namespace, cluster: Cluster, folder: Path) -> list[dict[str, Any]]:
    """Predicts every case, then lets them take turns."""
    chosen, rows = cases(options), []
    predictions = {case: predicted(case, cluster) for case in chosen}
    samples: dict[Case, list[float]] = {case: [] for case in chosen}
    for turn in range(0 if options.predict_only else options.rounds):
        for case in chosen:
            taken = case.runner(options.warmup, folder).measure_words(case.words(), options.steps)
            samples[case] += taken.step_seconds
            print(f"{case.recipe} round {turn + 1} {case.entry.name}: {taken.step_seconds}", file=sys.stderr)
    for case in chosen:
        found, seconds = predictions[case], samples[case]
        median = statistics.median(seconds) if seconds else None
        rows.append({
            "recipe": case.recipe,
            "case": case.entry.name,
            "predicted s": found.step_seconds,
            "measured s": median,
            "min..max": spread(seconds) if seconds else "-",
            "ratio": found.step_seconds / median if median else None,
            "parts": found.parts(),
            "samples": seconds,
        })  # fmt: skip
    return rows


def operators(recipe: str, cluster: Cluster) -> list[dict[str, Any]]:
    """Times the operators of a step of the recipe in this process, and predicts each."""
    words = Case(recipe, parse("bagualu", cores())).words()
    timed, steps = operator_times(compose([*words, "comm.backend=gloo"]), 3), 3
    chip = cluster.for_world(1).parts[0].chip
    measured, expected, calls = Counter[str](), Counter[str](), Counter[str]()
    for operator, seconds in timed:
        name = f"{operator.name.removeprefix('aten.')} {operator.inputs[0].dtype if operator.inputs else ''}"
        measured[name] += seconds / steps
        expected[name] += operator_seconds(chip, operator) / steps
        calls[name] += 1
    rows = [{"operator": "all", "calls": len(timed) // steps, "predicted s": expected.total(), "measured s": measured.total(),
             "ratio": expected.total() / measured.total()}]  # fmt: skip
    for name, seconds in measured.most_common(40):
        rows.append({"operator": name, "calls": calls[name] // steps, "predicted s": expected[name], "measured s": seconds,
                     "ratio": expected[name] / seconds})  # fmt: skip
    return rows


def main(argv: list[str]) -> int:
    options = arguments(argv)
    if options.what == "operators" and "GLIBC_TUNABLES" not in os.environ:  # start again with the settings of a worker
        return subprocess.run([sys.executable, __file__, *argv], env=environment(cores(), "tuned")).returncode
    document: dict[str, Any] = {"machine": machine(options.device), "versions": versions()}
    with tempfile.TemporaryDirectory(prefix="bench-this-machine-") as made:
        cluster = measured_cluster(options, Path(made))
        if options.what == "operators":
            tables = {recipe: operators(recipe, cluster) for recipe in options.recipes}
        else:
            tables = {"steps": compare(options, cluster, Path(made))}
    for title, rows in tables.items():
        print(title, table_of(rows), sep="\n", end="\n\n")
    if options.json:
        options.json.write_text(json.dumps({**document, "tables": tables}, indent=1) + "\n", encoding="utf-8")
    if options.what == "steps" and not options.predict_only:
        off, within = [abs(row["ratio"] - 1) for row in tables["steps"]], WITHIN[options.device]
        print(f"{sum(error <= within for error in off)} of {len(off)} cases within {within:.0%}; median error "
              f"{statistics.median(off):.1%}, largest {max(off):.1%}")  # fmt: skip
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

"""Tokens/s of the bench_* recipes: Bagualu against a plain PyTorch loop, torch DDP and FSDP2, and DeepSpeed ZeRO-1.

    python tests/bench/throughput.py --recipes bench_dense --contestants plain-f32 bagualu ddp-f32 --json out.json

Contestants are measured in the same run, alternating (A B A B ...), in processes of their own with the same cores,
threads and allocator. A contestant is PROGRAM[-VARIANT][-compiled][@PROCESSESxTHREADS]; see contest/entry.py. One that
fails is reported and left out; the exit code is then 1.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from contest.bagualu import Bagualu
from contest.entry import PLAIN, Entry, parse
from contest.environment import ALLOCATORS, cores_of, environment, machine, versions
from contest.report import add_ratios, result, table
from contest.shapes import SHAPES
from contest.team import BENCH, Contestant, Sample, Team

DEFAULT = ("plain-bf16", "plain-bf16wide", "plain-autocast", "plain-f32", "bagualu", "bagualu-data", "bagualu-tensor",
           "bagualu-pipeline", "ddp-bf16", "ddp-bf16wide", "deepspeed-bf16", "deepspeed-bf16wide")  # fmt: skip

ON_GPU = ("plain-bf16", "plain-bf16-compiled", "bagualu", "bagualu-compiled")


def arguments(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipes", nargs="+", default=["bench_dense"], choices=SHAPES, metavar="RECIPE")
    parser.add_argument("--contestants", nargs="+", metavar="NAME")
    parser.add_argument("--rounds", type=int, default=2, help="times every contestant gets its turn (default 2)")
    parser.add_argument("--steps", type=int, default=3, help="timed steps per turn (default 3)")
    parser.add_argument("--warmup", type=int, default=2, help="untimed steps of the first turn (default 2)")
    parser.add_argument("--baseline", metavar="NAME", help="compare with this one (default: the fastest plain loop)")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="cuda: plain and bagualu on a GPU")
    parser.add_argument("--allocator", choices=ALLOCATORS, default="tuned", help="C allocator settings of all")
    parser.add_argument("--override", action="append", default=[], metavar="KEY=VALUE", help="for bagualu train")
    parser.add_argument("--logs", type=Path, help="folder for the contestants' logs (default: a new one in /tmp)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write machine, versions and every sample here")
    options = parser.parse_args(argv)
    options.contestants = options.contestants or (ON_GPU if options.device == "cuda" else DEFAULT)
    try:
        options.entries = [parse(name, cores()) for name in options.contestants]
        for entry in options.entries:
            if options.device == "cuda" and (entry.program not in (*PLAIN, "bagualu") or entry.processes > 1):
                raise ValueError(f"{entry.name} is not measured on a GPU; give plain and bagualu in one process")
            cores_of(0, entry.processes, entry.threads)
        if options.baseline:
            options.baseline = parse(options.baseline, cores()).name
            if options.baseline not in [entry.name for entry in options.entries]:
                raise ValueError(f"--baseline {options.baseline} is not among the contestants; add it to --contestants")
    except ValueError as error:
        parser.error(str(error))
    return options


def measured_ceiling(device: str, allocator: str, before: dict[str, float]) -> dict[str, float]:
    """FLOP/s of the best square matmul on all cores or the GPU, by dtype; never less than `before`, as others may disturb."""
    variables = environment(cores(), allocator)
    variables["PYTHONPATH"] = os.pathsep.join(filter(None, (str(BENCH), variables.get("PYTHONPATH"))))
    command = [sys.executable, "-m", "contest.ceiling", device]
    done = subprocess.run(command, env=variables, stdout=subprocess.PIPE, check=True)
    figures: dict[str, float] = json.loads(done.stdout)
    return {dtype: max(figure, before.get(dtype, 0.0)) for dtype, figure in figures.items()}


def start(entry: Entry, recipe: str, options: argparse.Namespace) -> Contestant:
    if entry.program == "bagualu":
        return Bagualu(entry, recipe, options.allocator, options.warmup, options.logs, options.device, options.override)
    return Team(entry, recipe, options.allocator, options.warmup, options.logs, options.device)


def alternate(recipe: str, options: argparse.Namespace) -> tuple[dict[Entry, list[Sample]], list[str]]:
    """Start every contestant, then let them take turns. Returns the samples and what failed."""
    running: dict[Entry, Contestant] = {}
    samples: dict[Entry, list[Sample]] = {}
    failures = []
    try:
        for turn in range(options.rounds):
            for entry in [e for e in options.entries if turn == 0 or e in running]:
                try:
                    if turn == 0:
                        running[entry] = start(entry, recipe, options)
                    samples.setdefault(entry, []).append(running[entry].measure(options.steps))
                    print(f"{recipe} round {turn + 1} {entry.name}: {samples[entry][-1].step_seconds}", file=sys.stderr)
                except RuntimeError as error:
                    failures.append(str(error))
                    print(f"{recipe}: {error}", file=sys.stderr)
                    if entry in running:
                        running.pop(entry).close()
    finally:
        for contestant in running.values():
            contestant.close()
    return {entry: samples[entry] for entry in running}, failures


def cores() -> int:
    return len(os.sched_getaffinity(0))


def measure(argv: list[str]) -> dict[str, Any]:
    """Runs the benchmark, prints its tables and returns everything measured."""
    options = arguments(argv)
    options.logs = options.logs or Path(tempfile.mkdtemp(prefix="bench-logs-"))
    options.logs.mkdir(parents=True, exist_ok=True)
    ceiling = measured_ceiling(options.device, options.allocator, {})
    document: dict[str, Any] = {
        "machine": machine(options.device),
        "versions": versions(),
        "matmul_flops_per_second": ceiling,
        "allocator": options.allocator,
        "rounds": options.rounds,
        "steps": options.steps,
        "recipes": {},
        "failures": [],
    }
    for recipe in options.recipes:
        samples, failures = alternate(recipe, options)
        ceiling.update(measured_ceiling(options.device, options.allocator, ceiling))
        results = [result(entry, SHAPES[recipe], taken, max(ceiling.values())) for entry, taken in samples.items()]
        add_ratios(results, options.baseline)
        document["recipes"][recipe] = results
        document["failures"] += failures
        print(table(recipe, SHAPES[recipe], results), end="\n\n", flush=True)
    if options.json:
        options.json.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    return document


def main(argv: list[str]) -> int:
    return 1 if measure(argv)["failures"] else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

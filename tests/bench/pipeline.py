"""What pipelines cost and what their balance gains.

    python tests/bench/pipeline.py uneven       # split by measured costs against the one by count, on two processes
    python tests/bench/pipeline.py slowed       # a rank stopped half of the time: steps before, while its layers stay, after
    python tests/bench/pipeline.py bubble       # waiting measured, planned and published, of every schedule
    python tests/bench/pipeline.py schedules    # bench_dense: schedules against torch.distributed.pipelining and one process
    python tests/bench/pipeline.py simulated --stages 8      # the first three with ranks that sleep in place of computing

What is compared takes turns in one run. `--json FILE` writes machine, versions and every sample.
"""

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import throughput
from contest import bubble, many_ranks, slowed, uneven
from contest.environment import machine, versions
from contest.report import table_of

from bagualu.parallel.pipeline.registry import SCHEDULES

CONTEST = ("bagualu", "bagualu-1f1b", "bagualu-zb_h1", "bagualu-zb_v", "bagualu-interleaved_1f1b", "torchpp-bf16wide")
SIMULATED = ("bubble", "uneven", "slowed")
Tables = dict[str, list[dict[str, Any]]]


def arguments(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    made = {name: commands.add_parser(name) for name in ("uneven", "slowed", "bubble", "schedules", "simulated")}
    made["uneven"].add_argument("--cases", nargs="+", default=list(uneven.CASES), choices=uneven.CASES)
    made["uneven"].add_argument("--warmup", type=int, default=1, help="untimed steps of every run (default 1)")
    made["slowed"].add_argument("--speed", type=float, default=0.5, help="of the slow rank (default 0.5)")
    made["slowed"].add_argument("--steps", type=int, default=30, help="steps while a rank is slow (default 30)")
    made["simulated"].add_argument("--stages", type=int, default=8)
    made["simulated"].add_argument("--milliseconds", type=float, default=5.0, help="that a layer sleeps in a pass (default 5)")
    made["simulated"].add_argument("--what", nargs="+", default=list(SIMULATED), choices=SIMULATED)
    made["schedules"].add_argument("--contestants", nargs="+", default=list(CONTEST), metavar="NAME")
    made["schedules"].add_argument("--warmup", type=int, default=2, help="untimed steps of the first turn (default 2)")
    for name, steps in (("uneven", 5), ("schedules", 3), ("simulated", 3)):
        made[name].add_argument("--steps", type=int, default=steps, help=f"timed steps of every run (default {steps})")
    for name in ("bubble", "simulated"):
        made[name].add_argument("--schedules", nargs="+", default=list(SCHEDULES), choices=SCHEDULES)
    for name, one in made.items():
        one.add_argument("--rounds", type=int, default=1 if name == "slowed" else 2, help="turns of everybody")
        one.add_argument("--json", type=Path, metavar="FILE", help="write machine, versions and every sample here")
        one.add_argument("--folder", type=Path, help="keep run directories and logs here (default: a new folder in /tmp)")
    options = parser.parse_args(argv)
    if options.command == "slowed" and not 0 < options.speed < 1:
        parser.error(f"--speed {options.speed} must lie between 0 and 1, e.g. --speed 0.5")
    return options


def measure(options: argparse.Namespace, folder: Path) -> Tables:
    """Tables by title."""
    if options.command == "uneven":
        turns = options.rounds, options.warmup, options.steps
        return {f"{case}, 2 processes": uneven.compare(case, *turns, folder) for case in options.cases}
    if options.command == "slowed":
        plan = slowed.Plan(warmup=2, before=6, slow=options.steps, speed=options.speed)
        return {f"rank 1 at {options.speed} of its speed": slowed.compare(plan, options.rounds, folder)}
    if options.command == "bubble":
        return {"shares of waiting, 2 processes": bubble.compare(options.schedules, options.rounds, folder)}
    return simulated(options, folder)


def simulated(options: argparse.Namespace, folder: Path) -> Tables:
    stages, nap, tables = options.stages, options.milliseconds / 1e3, Tables()
    if "bubble" in options.what:
        tables[f"shares of waiting, {stages} ranks"] = many_ranks.bubble(stages, options.schedules, nap, folder / "bubble")
    if "uneven" in options.what:
        rows = many_ranks.uneven_layers(stages, nap, options.rounds, options.steps, folder / "uneven")
        tables[f"uneven layers, {stages} ranks"] = rows
    if "slowed" in options.what:
        tables[f"rank {stages // 2} of {stages} at half speed"] = many_ranks.slow_rank(stages, nap, folder / "slowed")
    return tables


def contest(options: argparse.Namespace, folder: Path) -> int:
    """The schedules are contestants like others."""
    baseline = ["--baseline", "bagualu"] if "bagualu" in options.contestants else []
    words = ["--recipes", "bench_dense", "--contestants", *options.contestants, *baseline, "--logs", str(folder)]
    words += ["--rounds", str(options.rounds), "--steps", str(options.steps), "--warmup", str(options.warmup)]
    return throughput.main([*words, *(["--json", str(options.json)] if options.json else [])])


def main(argv: list[str]) -> int:
    options = arguments(argv)
    folder = options.folder or Path(tempfile.mkdtemp(prefix="bench-pipeline-"))
    folder.mkdir(parents=True, exist_ok=True)
    if options.command == "schedules":
        return contest(options, folder)
    document: dict[str, Any] = {"command": argv, "machine": machine(), "versions": versions()}
    document["tables"] = measure(options, folder)
    for title, rows in document["tables"].items():
        print(f"{title}\n{table_of(rows)}", end="\n\n", flush=True)
    if options.json:
        options.json.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

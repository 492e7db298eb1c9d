"""Peak memory of the ranks of a run: against the ideal division of the state over data ranks, and against its prediction.

    python tests/bench/memory.py division --processes 2 4      # every engine and ZeRO stage on bench_dense_124m
    python tests/bench/memory.py predicted                     # the 12 recipes of memory_recipes.txt
    python tests/bench/memory.py predicted --engines           # the 12 recipes of memory_engine_recipes.txt

The peak is what summary.json has as memory.measured: the most bytes of tensors on the fullest rank in two steps, memory that ranks
share once. Ideal are parameters, gradients, master weights and moments by the stage's formula, at stage 3 with the largest layer
gathered and the next one besides, and everything else as measured at native stage 0. Where FSDP2 is among the engines, a last row
has the peak of a loop that uses it directly, on the plain model (contest/). `--json FILE` writes machine, versions and rows.
"""

import argparse
import json
import shlex
import shutil
import sys
import tempfile
from collections.abc import Iterator
from math import prod
from pathlib import Path
from typing import Any

from contest.entry import Entry
from contest.environment import machine, versions
from contest.report import table_of
from contest.runs import train
from contest.team import Team

from bagualu.parallel.config import ENGINES
from bagualu.trainer.costs.state import parameter_state
from bagualu.trainer.costs.work import work_of
from bagualu.trainer.models.decoder.shapes import layer_shapes, parameter_shapes
from bagualu.trainer.recipe.compose import compose

LISTS = {engines: Path(__file__).parent / f"memory{'_engine' * engines}_recipes.txt" for engines in (False, True)}
"""Files of recipes; that of engines also has stage 3 of the native engine."""
MIB = 2**20
Row = dict[str, Any]


def arguments(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    division, predicted = commands.add_parser("division"), commands.add_parser("predicted")
    division.add_argument("--recipe", default="bench_dense_124m")
    division.add_argument("--processes", type=int, nargs="+", default=[2, 4], help="data ranks (default 2 4)")
    division.add_argument("--engines", nargs="+", choices=ENGINES, default=list(ENGINES))
    predicted.add_argument("--only", type=int, nargs="+", metavar="NUMBER", help="lines of the list, from 1")
    predicted.add_argument("--engines", action="store_true", help="the list of recipes over engines")
    for one in (division, predicted):
        one.add_argument("--json", type=Path, metavar="FILE", help="write machine, versions and rows here")
        one.add_argument("--folder", type=Path, help="keep logs here (default: a new folder in /tmp)")
    return parser.parse_args(argv)


def memory_of(words: list[str], folder: Path, name: str) -> dict[str, Any]:
    """Trains two steps and returns the summary's `memory`; its log stays in `folder`."""
    run = train([*words, "train.steps=2", "comm.backend=gloo", "launch.threads=1"], folder / name, folder / f"{name}.log")
    shutil.rmtree(folder / name)
    memory: dict[str, Any] = run.summary["memory"]
    return memory


def division(options: argparse.Namespace, folder: Path) -> Iterator[Row]:
    for processes in options.processes:
        words = [f"recipe={options.recipe}", f"parallel.data={processes}"]
        measured = {("native", 0): memory_of([*words, "parallel.zero=0"], folder, f"{processes}-native-0")}
        besides = measured["native", 0]["measured"] - state(words, 0)
        for engine in options.engines:
            for zero in sorted(ENGINES[engine]):
                changed = [*words, f"parallel.engine={engine}", f"parallel.zero={zero}"]
                if (engine, zero) not in measured:
                    measured[engine, zero] = memory_of(changed, folder, f"{processes}-{engine}-{zero}")
                ideal = state(changed, zero) + besides
                yield row(measured[engine, zero], {"engine": engine, "zero": zero, "processes": processes}, ideal)
        if "fsdp" in options.engines:
            memory = {"predicted": None, "measured": fsdp_itself(options.recipe, processes, folder), "process": None}
            ideal = state([*words, "parallel.engine=fsdp"], 3) + besides
            yield row(memory, {"engine": "fully_shard itself", "zero": 3, "processes": processes}, ideal)


def fsdp_itself(recipe: str, processes: int, folder: Path) -> float:
    """Returns the peak bytes of a rank that trains the plain model in a loop over FSDP2."""
    team = Team(Entry("fsdp", "bf16", False, processes, 1), recipe, "tuned", 0, folder, "cpu", tensors=True)
    try:
        return team.measure(2).peak_memory_bytes / processes
    finally:
        team.close()


def state(words: list[str], zero: int) -> int:
    """Bytes of a rank's ideal part of the state at a ZeRO stage, and of the gathered weights of two layers at stage 3."""
    recipe = compose([*words, f"parallel.zero={zero}", "comm.backend=gloo"])
    layout = recipe.validate(recipe.world_size())
    work = work_of(recipe, layout)
    layers = [sum(map(prod, layer_shapes(recipe.model, index).values())) for index in range(recipe.model.layers)]
    gathered = 2 * max(layers) * work.item_bytes if zero == 3 else 0
    return sum(parameter_state(work, *named).total() for named in parameter_shapes(recipe.model).items()) + gathered


def predicted(options: argparse.Namespace, folder: Path) -> Iterator[Row]:
    for number, line in enumerate(LISTS[options.engines].read_text(encoding="utf-8").splitlines(), 1):
        if options.only is None or number in options.only:
            words = shlex.split(line.replace("'", "\\'"))
            short = " ".join(word.rpartition(".")[2] for word in words[1:] if word.startswith(("parallel", "train")))
            yield row(memory_of(words, folder, str(number)), {"recipe": f"{number}: {short}"}, None)


def row(memory: dict[str, Any], named: Row, ideal: int | None) -> Row:
    said, measured = sum(memory["predicted"].values()) if memory["predicted"] else None, memory["measured"]
    figures: Row = {"measured MiB": measured / MIB, "predicted MiB": said and said / MIB}
    figures["predicted / measured"] = said and said / measured
    if ideal is not None:
        figures |= {"ideal MiB": ideal / MIB, "measured / ideal": measured / ideal}
    return named | figures | {"process MiB": memory["process"] and memory["process"] / MIB, "kinds": memory["predicted"]}


def main(argv: list[str]) -> int:
    options = arguments(argv)
    folder = options.folder or Path(tempfile.mkdtemp(prefix="bench-memory-"))
    folder.mkdir(parents=True, exist_ok=True)
    rows = []
    for one in {"division": division, "predicted": predicted}[options.command](options, folder):
        rows.append(one)
        print(table_of([one]).splitlines()[1], file=sys.stderr, flush=True)
    print(table_of(rows))
    if options.json:
        document = {"command": argv, "machine": machine(), "versions": versions(), "rows": rows}
        options.json.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

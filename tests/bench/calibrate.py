"""Computes the efficiencies of matrix products on chips from step times of single nodes that others have published.

    python tests/bench/calibrate.py RUNS.csv --traces FOLDER            # prints what it finds
    python tests/bench/calibrate.py RUNS.csv --traces FOLDER --write    # and writes it to recipes/cluster/*.yaml

Only rows of single nodes are read; published_runs.py tests with the others. All chips with the same die, and both dtypes of 16
bits, get the same table, because their matrix units are the same. A dtype with few rows keeps the shape of the table of 16 bits,
and only its level is fitted. A chip without rows gets the table of the nearest chip of its vendor."""

import argparse
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from importlib.resources import files
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parent))  # the benchmarks are programs, not an installed package

from published.describe import Run
from published.fit import Measured, Values, Vector, fit, path_of, seconds
from published.predicted import CALIBRATION, Traces, replayed_of, use_of
from published.report import quantile
from published.rows import Row, read_rows
from published.table import with_tables

from bagualu.comm.cluster_file import load_cluster
from bagualu.comm.topology import Chip, ShapeEfficiency
from bagualu.parallel.simulation.events import Role
from bagualu.parallel.simulation.operator_cost import terms_of

SOURCE = "python tests/bench/calibrate.py RUNS.csv --write, from step times of single nodes (die: {die}{nearest})"
DIES = {"a100_40gb": "A100", "a100": "A100", "h100": "H100", "b200": "B200", "b300": "B200"}
"""The clusters whose chips have the same matrix units."""
NEAREST = {"A100": (), "H100": ("h200", "h800"), "B200": ("gb200", "gb300")}
"""By die, the clusters without rows of single nodes that get its table, from the earliest die."""
GROUPS = {"float16": "half", "bfloat16": "half", "float8": "float8"}
"""The dtypes that share coefficients."""
START = np.array([1.3, 60.0])
SIDES, DEPTHS = (512, 2048, 8192), (64, 256, 1024, 8192)
"""A table has an entry for each of these as m = n, and as k."""
LEAST_SHAPES = 12
"""With fewer different shapes of a dtype, only the level of its table is fitted, and its form is that of the die before. Without
any, the whole table is that of the die before."""
ITERATIONS = 3
"""How often the replay is repeated with what was found, since what it adds depends on it."""


@dataclass(frozen=True)
class Sample:
    """A row of calibration with its traces."""

    row: Row
    run: Run
    roles: Sequence[Role]
    seconds: float
    weight: float = 1.0


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path, metavar="RUNS.csv")
    parser.add_argument("--traces", type=Path, metavar="FOLDER", help="take traces from here, and keep them here")
    parser.add_argument("--known", action="store_true", help="only rows whose traces are there already")
    parser.add_argument("--write", action="store_true", help="write the tables to recipes/cluster/*.yaml")
    parser.add_argument("--rows", action="store_true", help="print the error of each row")
    return parser.parse_args()


def samples(rows: Sequence[Row], traces: Traces, known: bool) -> list[Sample]:
    """Returns the rows of calibration, those of shapes that many rows have with a smaller weight."""
    found = []
    for row in rows:
        used, _, published, run = use_of(row)
        if used == CALIBRATION and run is not None and (traces.has(run) or not known):
            found.append(Sample(row, run, traces.of(run), published.step_seconds or 0.0))
    shapes = Counter(map(shape_of, found))
    return [replace(one, weight=shapes[shape_of(one)] ** -0.5) for one in found]


def shape_of(sample: Sample) -> tuple[str, ...]:
    """Returns what determines the shapes of products, with their dtype at the end."""
    columns = tuple(sample.row.text(column) for column in ("hidden", "tp", "mbs", "seq_len"))
    return (*columns, sample.run.recipe.train.dtype)


def measured(sample: Sample, values: Values) -> Measured:
    """Returns what is on the path of a row, and what the replay adds to it with these values."""
    part = sample.run.cluster.parts[0]
    chip = replace(part.chip, efficiency=tables(part.chip, values))
    replayed = replayed_of(sample.run, sample.roles, replace(sample.run.cluster, parts=(replace(part, chip=chip),)))
    slowest = max(replayed.roles, key=lambda role: role.busy_seconds).role
    path = path_of(slowest, sample.run.recipe.parallel.pipeline)
    one = Measured(chip, sample.seconds, path, sample.weight, attention_slower=sample.run.attention_slower)
    alone = seconds([one], replace(values, dispatch_seconds=0.0), GROUPS)[0]
    return replace(one, rest_seconds=max(0.0, replayed.step_seconds - alone))


def tables(chip: Chip, values: Values) -> dict[str, tuple[ShapeEfficiency, ...]]:
    """Returns the efficiencies of a chip, for each dtype that it multiplies."""
    return {
        dtype: tuple(_entry(chip, dtype, side, depth, values.products[name]) for side in SIDES for depth in DEPTHS)
        for dtype, name in GROUPS.items()
        if dtype in chip.matmul_flops_per_second and name in values.products
    }


def _entry(chip: Chip, dtype: str, side: int, depth: int, coefficients: Vector) -> ShapeEfficiency:
    terms = terms_of(chip.cores, chip.peak(dtype) / chip.memory_bytes_per_second, 1, side, side, depth)
    return ShapeEfficiency(side, side, depth, min(1.0, 1 / float(terms @ coefficients)))


def calibrate(found: Sequence[Sample], before: Values) -> Values:
    """Returns the values of a die, of which `before` are those of the die before it."""
    dtypes = {GROUPS[sample.run.recipe.train.dtype] for sample in found} | {"half"}
    values = replace(before, products={name: before.products.get(name, before.products["half"]) for name in sorted(dtypes)})
    shapes = Counter(GROUPS[sample[-1]] for sample in set(map(shape_of, found)))
    whole = [name for name in shapes if shapes[name] >= LEAST_SHAPES]
    levels = [name for name in shapes if shapes[name] < LEAST_SHAPES]
    for _ in range(ITERATIONS):
        values = fit([measured(sample, values) for sample in found], values, GROUPS, whole, levels)
    return values


def show(name: str, found: Sequence[Sample], values: Values, rows: bool) -> None:
    runs = [measured(sample, values) for sample in found]
    off = seconds(runs, values, GROUPS) / np.array([run.seconds for run in runs]) - 1
    sizes = [abs(error) for error in off]
    print(f"{name}: {len(found)} rows, error median {quantile(sizes, 0.5):.1%}, 90% {quantile(sizes, 0.9):.1%}")
    for group, coefficients in values.products.items():
        print(f"  {group}: {' '.join(f'{value:.4g}' for value in coefficients)}")
    print(f"  the host starts an operator in {values.dispatch_seconds:.2g} s")
    for sample, error in zip(found, off, strict=True) if rows else ():
        print("   ", *(f"{sample.row.text(key):>9}" for key in ("model", "hidden", "tp", "pp", "mbs", "seq_len")), f"{error:+.1%}")


def write(die: str, values: Values) -> None:
    """Writes the tables of a die into the cluster files that have it."""
    own = [name for name, its in DIES.items() if its == die]
    for name in (*own, *NEAREST[die]):
        path = Path(str(files("bagualu.recipes") / "cluster" / f"{name}.yaml"))
        chip = load_cluster(name).parts[0].chip
        source = SOURCE.format(die=die, nearest="" if name in own else ", the nearest with any")
        path.write_text(with_tables(path.read_text(encoding="utf-8"), tables(chip, values), source), encoding="utf-8")


def main() -> None:
    given = arguments()
    found = samples(list(read_rows(given.runs)), Traces(given.traces), given.known)
    values = Values({"half": START}, 5e-5)
    for die in NEAREST:
        own = [sample for sample in found if DIES.get(sample.run.cluster.name) == die]
        if own:
            values = calibrate(own, values)
            show(die, own, values, given.rows)
            if given.write:
                write(die, values)


if __name__ == "__main__":
    main()

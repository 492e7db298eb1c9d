"""Predicts the step times and memory of published runs, and prints how far predictions and measurements are apart.

    python tests/bench/published_runs.py RUNS.csv --json RESULT.json

The file has a line for each run, with the columns of published/rows.py and published/describe.py. Nothing is fitted here: the
figures of chips are those of recipes/cluster/, of which the efficiencies of matrix products were computed by calibrate.py from rows
of single nodes. Rows that cannot be compared are left out by rule, with the reason. RESULT.json has {rows: [...]} with run_id, used
(calibration | test | left out), reason, predicted and published (step_seconds, memory_bytes, fits; null where there is none).
"""

import argparse
import json
import sys
from collections.abc import Sequence
from math import prod
from multiprocessing import get_context
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))  # the benchmarks are programs, not an installed package

from published.predicted import TEST, Predicted, Traces, as_json, predicted
from published.report import report
from published.rows import Row, read_rows

from bagualu.parallel.simulation.error_band import HeldOutError, write_errors
from bagualu.trainer.models.decoder.shapes import parameter_shapes

ERRORS_SOURCE = "python tests/bench/published_runs.py RUNS.csv --errors recipes/held_out_errors.yaml"


def arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path, metavar="RUNS.csv")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all rows here")
    parser.add_argument("--errors", type=Path, metavar="FILE", help="write the errors of test rows here, for `bagualu simulate`")
    parser.add_argument("--traces", type=Path, metavar="FOLDER", help="keep traces here, for programs of the same version")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--only", metavar="TEXT", help="only rows with this text in their source or model")
    parser.add_argument("--every", type=int, default=1, metavar="N", help="only every N-th row")
    return parser.parse_args(argv)


def predict_all(rows: Sequence[Row], traces: Traces, processes: int) -> list[Predicted]:
    """Returns the predictions of all rows, in their order."""
    if processes == 1:
        return [predicted(row, traces) for row in rows]
    with get_context("spawn").Pool(processes) as pool:
        return pool.starmap(predicted, [(row, traces) for row in rows], chunksize=1)


def chosen(given: argparse.Namespace) -> list[Row]:
    rows = list(read_rows(given.runs))
    if given.only:
        rows = [row for row in rows if given.only.lower() in f"{row.text('source')} {row.text('model')}".lower()]
    return rows[:: given.every]


def held_out(rows: Sequence[Predicted]) -> list[HeldOutError]:
    """Returns the errors of the step times of test rows."""
    found = []
    for row in rows:
        if row.used == TEST and row.run and row.figures and row.published.step_seconds:
            model = row.run.recipe.model
            parameters = sum(prod(shape) for shape in parameter_shapes(model).values())
            error = row.figures.step_seconds / row.published.step_seconds - 1
            kind = "moe" if model.moe.experts else "dense"
            found.append(HeldOutError(row.run.cluster.parts[0].chip.name, row.run.world, parameters, kind, error))
    return found


def main() -> None:
    given = arguments()
    rows = predict_all(chosen(given), Traces(given.traces), given.processes)
    if given.json:
        given.json.write_text(json.dumps({"rows": [as_json(row) for row in rows]}, indent=1) + "\n", encoding="utf-8")
    if given.errors:
        given.errors.write_text(write_errors(held_out(rows), ERRORS_SOURCE), encoding="utf-8")
    print(report(rows))


if __name__ == "__main__":
    main()

"""`bagualu checkpoint list|verify RUN_DIR`: what is in a run, and whether it is whole. Free of torch."""

from pathlib import Path
from typing import Any

from bagualu.comm.errors import RecipeError
from bagualu.fault_tolerance.checkpoint.inspect import describe, verify
from bagualu.launch.usage import Request
from bagualu.trainer.outcome import DONE, FAILED

_FOLDER = "checkpoints"


def checkpoint(request: Request) -> tuple[int, Any]:
    """Print one line for each checkpoint of a run; exit code 1 when one is damaged, and the document for --json."""
    if len(request.overrides) != 2 or request.overrides[0] not in ("list", "verify"):
        given = " ".join(request.overrides) or "nothing"
        raise RecipeError(
            f"checkpoint takes list or verify and a run directory, not {given}; e.g. bagualu checkpoint list runs/tiny"
        )
    what, run_dir = request.overrides
    root = Path(run_dir) / _FOLDER
    if not root.is_dir():
        raise RecipeError(f"{root} does not exist; give the directory of a run that has saved a checkpoint")
    rows = describe(root)
    for row in rows:
        if what == "verify" and row["problem"] is None:
            row["problem"] = "; ".join(verify(Path(row["path"]))) or None
        if not request.json:
            print(_line(row, "whole" if what == "verify" else "looks whole"))
    if not rows and not request.json:
        print(f"no checkpoint in {root}")
    return FAILED if any(row["problem"] for row in rows) else DONE, rows


def _line(row: dict[str, Any], good: str) -> str:
    size = "?" if row["bytes"] is None else f"{row['bytes'] / 1e6:.1f} MB"
    degrees = (row["layout"] or {}).items()
    layout = " x ".join(f"{axis} {degree}" for axis, degree in degrees if degree > 1) or "one rank"
    return f"step {row['step']:>8}  {size:>12}  {layout:<36}  {row['problem'] or good}"

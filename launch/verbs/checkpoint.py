"""`bagualu checkpoint`: lists checkpoints and reports damage; brings models of Hugging Face in and out."""

import datetime
import sys
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from bagualu.comm.errors import RecipeError
from bagualu.fault_tolerance.checkpoint.layout.directory import is_checkpoint, list_checkpoints
from bagualu.fault_tolerance.checkpoint.layout.format import CheckpointError
from bagualu.fault_tolerance.checkpoint.layout.quarantine import list_set_aside
from bagualu.fault_tolerance.checkpoint.reading.inspect import describe, verify
from bagualu.fault_tolerance.run_directory import RunDirectory
from bagualu.launch.verbs.command_line import CommandLine
from bagualu.trainer.process.environment import cores
from bagualu.trainer.process.failure import DONE, FAILED

_HISTORY = ("losses", "norms")


def checkpoint(request: CommandLine) -> tuple[int, Any]:
    """Print a table of a run's checkpoints, or convert a model. Returns the exit code and the object that --json prints. The exit
    code is 1 if a problem was found in a checkpoint (`list` looks quickly, `verify` at every byte); checkpoints set aside do not
    count.

    The object is a list with the result of `inspect.describe` for each checkpoint, with a list `problems` instead of `problem`,
    and without the guard's long history; of a conversion, path, parameters and bytes. Raises RecipeError.
    """
    if request.overrides[:1] in (["import"], ["export"]):
        return _convert(request)
    if len(request.overrides) != 2 or request.overrides[0] not in ("list", "verify"):
        given = " ".join(request.overrides) or "nothing"
        raise RecipeError(
            f"checkpoint takes list or verify and a run directory or a checkpoint, or import or export, not {given}; "
            "e.g. bagualu checkpoint list runs/tiny"
        )
    what, given = request.overrides
    if given.startswith("run.dir=") and not Path(given).exists():
        given = given.removeprefix("run.dir=")
    paths, aside = _find(Path(given).expanduser())
    rows = [_row(path, everything=what == "verify") for path in paths]
    if not request.json:
        _print(rows, "whole" if what == "verify" else "looks whole")
        for path in aside:
            print(f"set aside as damaged: {path}")
    return FAILED if any(row["problems"] for row in rows) else DONE, rows


def _convert(request: CommandLine) -> tuple[int, Any]:
    """Imports or exports a model. Raises RecipeError."""
    what, *rest = request.overrides
    known = ("to",) if what == "import" else ("to", "dtype", "format")
    words = dict(word.split("=", 1) for word in rest if "=" in word and word.split("=", 1)[0] in known)
    paths = [word for word in rest if word.split("=", 1)[0] not in words]
    if len(paths) != 1 or not words.get("to") or len(words) + 1 != len(rest):
        example = {"import": "checkpoint import HF_DIR to=RUN", "export": "checkpoint export RUN_OR_CHECKPOINT to=HF_DIR"}[what]
        raise RecipeError(f"checkpoint {what} cannot take {' '.join(rest) or 'nothing'}; give bagualu {example}")
    source, to = (Path(text).expanduser() for text in (paths[0], words["to"]))
    if not source.is_dir():
        raise RecipeError(f"{source} is no directory; give that of {'a model' if what == 'import' else 'a run or of a checkpoint'}")
    try:
        if what == "import":
            from bagualu.trainer.conversion.import_model import import_model

            result = import_model(source, to)
        else:
            from bagualu.trainer.conversion.export_model import export_model

            result = export_model(source, to, words.get("dtype"), words.get("format", "safetensors"))
    except CheckpointError as error:
        raise RecipeError(str(error)) from error
    if not request.json:
        print(f"{result['parameters']:,} parameters, {_size(result['bytes'])}: {result['path']}")
    return DONE, result


def _find(given: Path) -> tuple[list[Path], list[Path]]:
    """Returns two lists of paths: the checkpoints at `given`, a run directory or a checkpoint, and, for a run directory, those that
    were set aside as damaged. Raises RecipeError if there is no such directory."""
    if is_checkpoint(given):
        if not given.is_dir():
            raise RecipeError(f"{given} does not exist; `bagualu checkpoint list RUN_DIR` lists those that exist")
        return [given], []
    root = RunDirectory(given).checkpoints
    if not root.is_dir():
        raise RecipeError(f"{root} does not exist; give the directory of a run that has saved a checkpoint")
    return list_checkpoints(root), list_set_aside(root)


def _row(path: Path, everything: bool) -> dict[str, Any]:
    row = describe(path)
    if isinstance(guard := (row["metadata"] or {}).get("guard"), dict):  # without the long history, which only the run needs
        row["metadata"] = {**row["metadata"], "guard": {key: value for key, value in guard.items() if key not in _HISTORY}}
    quick = row.pop("problem")
    return {**row, "problems": verify(path, cores()) if everything else [quick] if quick else []}


def _print(rows: list[dict[str, Any]], good: str) -> None:
    """Print the table of checkpoints, and below it every problem on a line of its own."""
    if not rows:
        return print("no checkpoint here")
    table = Table("step", "saved", "size", "shards", "layout", "health", box=None, pad_edge=False)
    for column in (0, 2, 3):
        table.columns[column].justify = "right"
    table.columns[1].no_wrap = table.columns[5].no_wrap = True
    for row in rows:
        count = len(row["problems"])
        health = Text(f"{count} problem{'s' * (count > 1)}", "red") if count else Text(good, "green")
        shards = "?" if row["shards"] is None else str(row["shards"])
        table.add_row(str(row["step"]), _time(row["saved"]), _size(row["bytes"]), shards, _layout(row["layout"]), health)
    Console(width=None if sys.stdout.isatty() else 120).print(table)
    for row in rows:
        for problem in row["problems"]:
            print(problem)
    return None


def _time(seconds: float | None) -> str:
    return "?" if seconds is None else datetime.datetime.fromtimestamp(seconds).strftime("%Y-%m-%d %H:%M")


def _size(count: int | None) -> str:
    return "?" if count is None else f"{count / 1e9:.2f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"


def _layout(degrees: Any) -> str:
    if not isinstance(degrees, dict):
        return "?"
    return " x ".join(f"{axis} {degree}" for axis, degree in degrees.items() if degree not in (0, 1)) or "one rank"

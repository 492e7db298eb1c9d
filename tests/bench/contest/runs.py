"""Runs of `bagualu train`, and what they leave in their run directory. Free of torch."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from contest.environment import environment
from contest.team import BENCH

_PROGRAM = "import sys; from bagualu.launch.cli import main; sys.exit(main(entrypoint='contest.named:train'))"
QUIET = ("train.validation_sequences=0", "checkpoint.every=0", "log.progress=off", "restart.limit=0")
"""Nothing but steps, and what has failed is not started again."""


@dataclass(frozen=True)
class Ended:
    """A run that has come to its end."""

    records: list[dict[str, Any]]
    """metrics.jsonl: one for each step."""
    summary: dict[str, Any]
    passes: list[dict[str, Any]]
    """pipeline.jsonl: those of one step; none without a pipeline."""

    @property
    def step_seconds(self) -> list[float]:
        return [record["step_seconds"] for record in self.records]

    @property
    def passes_seconds(self) -> float:
        """From the first pass of the recorded step to the end of its last one."""
        return max(one["end"] for one in self.passes) - min(one["start"] for one in self.passes)


def train(
    words: list[str],
    folder: Path,
    log: Path,
    threads: int = 1,
    allocator: str = "tuned",
    meanwhile: Callable[[subprocess.Popen[bytes]], None] = lambda launcher: None,
) -> Ended:
    """Train with the overrides `words` in the run directory `folder`; its workers leave their process ids there (named.py).
    `meanwhile` is called with the launcher while it runs. Raises RuntimeError that names the log when the run fails."""
    command = [sys.executable, "-c", _PROGRAM, "train", f"run.dir={folder}", *QUIET, *words, "--json"]
    variables = environment(threads, allocator)
    variables["PYTHONPATH"] = os.pathsep.join(filter(None, (str(BENCH), variables.get("PYTHONPATH"))))
    with log.open("w", encoding="utf-8") as stream:
        launcher = subprocess.Popen(command, stdout=stream, stderr=stream, env=variables)
        try:
            meanwhile(launcher)
        except BaseException:
            launcher.terminate()
            raise
        finally:
            code = launcher.wait()
    if code:
        raise RuntimeError(f"a run with {' '.join(words)} failed with exit code {code}, see {log}")
    return read(folder)


def read(folder: Path) -> Ended:
    summary = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
    return Ended(lines(folder / "metrics.jsonl"), summary, lines(folder / "pipeline.jsonl"))


def lines(path: Path) -> list[dict[str, Any]]:
    """The objects of a file with one on each line; none where there is no file."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []

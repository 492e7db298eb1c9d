"""Bagualu as a contestant: `bagualu train` in a fresh process every round, read back from its run directory."""

import json
import subprocess
import sys
import tempfile
from pathlib import Path

from contest.entry import Entry
from contest.environment import environment
from contest.shapes import SHAPES
from contest.team import Sample


def overrides(entry: Entry, recipe: str) -> list[str]:
    """How the recipe is changed for `entry`. A data rank gets one micro-batch, or several to fill a pipeline."""
    data_ranks = entry.processes if entry.variant in ("data", "expert") else 1
    micro_batches = entry.processes if entry.variant == "pipeline" else 1
    changed = [
        f"launch.workers={entry.processes}",
        f"launch.threads={entry.threads}",
        f"train.micro_batch={SHAPES[recipe].batch // data_ranks // micro_batches}",
        f"train.compile={str(entry.compiled).lower()}",
    ]
    return changed + ([f"parallel.{entry.variant}={entry.processes}"] if entry.variant else [])


class Bagualu:
    """Runs warm-up and timed steps in one run, since a run is what a user starts."""

    def __init__(self, entry: Entry, recipe: str, allocator: str, warmup: int, logs: Path, extra: list[str]) -> None:
        self.entry, self.recipe, self.allocator, self.warmup, self.extra = entry, recipe, allocator, warmup, extra
        self.log = logs / f"{recipe}-{entry.name}.log"

    def measure(self, steps: int) -> Sample:
        with tempfile.TemporaryDirectory(prefix="bagualu-bench-") as folder:
            run = Path(folder) / "run"
            program = Path(sys.executable).with_name("bagualu")
            command = [str(program), "train", f"recipe={self.recipe}", f"run.dir={run}",
                       f"train.steps={self.warmup + steps}", "train.validation_sequences=0", "checkpoint.every=0",
                       "log.progress=off", *overrides(self.entry, self.recipe), *self.extra, "--json"]  # fmt: skip
            with self.log.open("w", encoding="utf-8") as log:
                variables = environment(self.entry.threads, self.allocator)
                done = subprocess.run(command, stdout=log, stderr=log, env=variables)
            if done.returncode:
                raise RuntimeError(f"{self.entry.name} failed with exit code {done.returncode}, see {self.log}")
            return read(run, self.warmup)

    def close(self) -> None:
        """Nothing lives between rounds."""


def read(run: Path, skip: int) -> Sample:
    """Step times after the first `skip` steps from metrics.jsonl, peak memory over all ranks from summary.json."""
    lines = (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    seconds = [json.loads(line)["step_seconds"] for line in lines][skip:]
    summary = json.loads((run / "summary.json").read_text(encoding="utf-8"))
    return Sample(seconds, [], int(summary["peak_memory_bytes"]))

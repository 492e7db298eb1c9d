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

BALANCE = {"bench_dense": "[5,3]", "bench_dense_124m": "[8,4]", "bench_moe": "[4,2]"}
"""Layers of two stages, by FLOPs: the head weighs as much as 1.3 layers (3.5 in bench_dense_124m)."""


def overrides(entry: Entry, recipe: str) -> list[str]:
    """How the recipe is changed for `entry`. A data rank gets one micro-batch; a pipeline one for each sequence."""
    data_ranks = entry.processes if entry.variant in ("data", "expert") else 1
    pipeline = entry.variant == "pipeline"
    changed = [
        f"launch.workers={entry.processes}",
        f"launch.threads={entry.threads}",
        f"train.micro_batch={1 if pipeline else SHAPES[recipe].batch // data_ranks}",
        f"train.compile={str(entry.compiled).lower()}",
    ]
    if pipeline and entry.processes == 2:
        changed.append(f"parallel.balance={BALANCE[recipe]}")
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

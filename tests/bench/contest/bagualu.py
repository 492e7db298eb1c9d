"""Bagualu as a contestant: `bagualu train` in a fresh process every round, read back from its run directory."""

import tempfile
from pathlib import Path

from bagualu.parallel.pipeline.registry import SCHEDULES
from contest.entry import ENGINE_STAGES, Entry
from contest.runs import Ended, train
from contest.shapes import SHAPES
from contest.team import Sample


def overrides(entry: Entry, recipe: str) -> list[str]:
    """How the recipe is changed for `entry`. A data rank gets one micro-batch; the layers and the micro-batches of a pipeline are
    split by measured costs."""
    data_ranks = entry.processes if entry.axis in ("data", "expert") else 1
    pipeline = entry.axis == "pipeline"
    changed = [
        f"launch.workers={entry.processes}",
        f"launch.threads={entry.threads}",
        f"train.micro_batch={'auto' if pipeline else SHAPES[recipe].batch // data_ranks}",
        f"train.compile={str(entry.compiled).lower()}",
    ]
    if pipeline:
        changed.append("parallel.balance=measured")
    if entry.variant in ENGINE_STAGES:
        engine, stage = ENGINE_STAGES[entry.variant]
        changed += [f"parallel.engine={engine}", f"parallel.zero={stage}"]
    if entry.variant in SCHEDULES:
        changed.append(f"parallel.schedule={entry.variant}")
    return changed + ([f"parallel.{entry.axis}={entry.processes}"] if entry.axis else [])


class Bagualu:
    """Runs warm-up and timed steps in one run, since a run is what a user starts."""

    def __init__(self, entry: Entry, recipe: str, allocator: str, warmup: int, logs: Path, device: str, extra: list[str]) -> None:
        self.entry, self.recipe, self.allocator, self.warmup = entry, recipe, allocator, warmup
        on_gpu = ["comm.backend=nccl", "train.deterministic=false"]  # as the plain loop, which takes any kernel
        self.extra = [*(on_gpu if device == "cuda" else ["comm.backend=gloo"]), *extra]
        self.log = logs / f"{recipe}-{entry.name}.log"

    def measure(self, steps: int) -> Sample:
        return self.measure_words([f"recipe={self.recipe}", *overrides(self.entry, self.recipe)], steps)

    def measure_words(self, words: list[str], steps: int) -> Sample:
        """Runs the recipe that `words` give."""
        with tempfile.TemporaryDirectory(prefix="bagualu-bench-") as folder:
            words = [*words, f"train.steps={self.warmup + steps}", *self.extra]
            run = train(words, Path(folder) / "run", self.log, self.entry.threads, self.allocator)
            return sample(run, self.warmup)

    def close(self) -> None:
        """Nothing lives between rounds."""


def sample(run: Ended, skip: int) -> Sample:
    """Step times after the first `skip` steps, peak memory over all ranks."""
    return Sample(run.step_seconds[skip:], [], int(run.summary["peak_memory_bytes"]))

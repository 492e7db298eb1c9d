"""What must hold after every fault, as functions: the standing assertions of the fault-tolerance tests."""

import contextlib
import fcntl
import json
import os
import re
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

from bagualu.comm.group import Communicator
from bagualu.fault_tolerance.checkpoint.compare import differences
from bagualu.fault_tolerance.checkpoint.directory import latest
from bagualu.fault_tolerance.ledger.events import Event, read
from bagualu.fault_tolerance.ledger.totals import CATEGORIES, attribute
from bagualu.trainer import run as whole_run
from bagualu.trainer.assemble import Parts, assemble
from bagualu.trainer.config import Recipe
from bagualu.trainer.data.corpus import Corpus

_MEASURED = ("seconds", "per_second", "mfu")
"""Figures of the clock: their names end like this."""
_OF_SAVES = "checkpoint"
"""Figures of checkpoints, whose writing goes on beside the steps: their names begin like this."""
_OF_TROUBLE = ("cause", "ranks", "attempts")
"""What a step says that went well only when it was done again."""
_CACHES = ("torchinductor_",)
"""Of torch, meant to stay."""
_SHARED_MEMORY = Path("/dev/shm")


def figures(run_dir: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl: what was computed, not when, nor what it took to get there."""
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if not _may_vary(key)} for line in lines]


def _may_vary(key: str) -> bool:
    return key.endswith(_MEASURED) or key.startswith(_OF_SAVES) or key in _OF_TROUBLE


def assert_same_run(run_dir: Path, reference: Path) -> None:
    """Every step once with the same figures, and the same final weights, moments and counters, all to the bit."""
    assert figures(run_dir) == figures(reference)
    ends = [latest(folder / "checkpoints") for folder in (run_dir, reference)]
    assert ends[0] is not None
    assert ends[1] is not None
    assert ends[0].name == ends[1].name
    differing = differences(ends[0], ends[1])
    assert differing == [], differing


class _Noting:
    """Batches that note in a file which samples they hand out."""

    def __init__(self, batches: Any, path: Path) -> None:
        self.batches, self.path = batches, path

    def __getattr__(self, name: str) -> Any:
        return getattr(self.batches, name)

    def batch(self, step: int, start: int, count: int) -> Any:
        ids = self.batches.sample_ids(step)[start : start + count].tolist()
        with self.path.open("a") as file:
            file.write(json.dumps({"step": step + 1, "start": start, "ids": ids}) + "\n")
        return self.batches.batch(step, start, count)


def _assemble_noting(recipe: Recipe, communicator: Communicator, corpus: Corpus) -> Parts:
    parts = assemble(recipe, communicator, corpus)
    parts.batches = _Noting(parts.batches, Path(recipe.run.dir) / f"samples-{communicator.rank}.jsonl")  # type: ignore[assignment]
    return parts


def train_noting_samples(recipe: Recipe, communicator: Communicator, stop: Any, scratch: Path | None = None) -> dict[str, Any]:
    """An entrypoint: the trainer, with a note of every sample that a rank takes. For `assert_every_sample_once`."""
    whole_run.assemble = _assemble_noting
    return whole_run.train(recipe, communicator, stop, scratch)


def assert_every_sample_once(run_dir: Path, recipe: Recipe) -> None:
    """Each step used its whole global batch, the same one whenever it was done again, and no sample twice in an epoch."""
    used: dict[tuple[int, int], int] = {}
    for path in run_dir.glob("samples-*.jsonl"):
        for line in path.read_text().splitlines():
            try:
                entry = json.loads(line)
            except ValueError:  # cut short by a kill, and done again
                continue
            for position, sample in enumerate(entry["ids"], entry["start"]):
                assert used.setdefault((entry["step"], position), sample) == sample
    batch = recipe.data.global_batch
    assert used.keys() == {(step, position) for step in range(1, recipe.train.steps + 1) for position in range(batch)}
    times = Counter(used.values()).values()
    assert max(times) - min(times) <= 1


def assert_ledger_adds_up(run_dir: Path, seconds: float | None = None) -> None:
    """Every second in exactly one category; together no more than `seconds`, the wall time seen from outside, and at least three
    quarters of what lies between the files that a launch begins and ends with."""
    totals = json.loads((run_dir / "summary.json").read_text())["ledger"]
    events = read(run_dir)
    assert totals == {name: value for name, value in attribute(events).items() if name in totals}
    assert abs(sum(totals[name] for name in CATEGORIES) - totals["wall"]) < 1e-6
    assert abs(totals["wall"] - (events[-1].monotonic - events[0].monotonic)) < 1e-5
    assert totals["productive"] > 0
    if seconds is not None:
        assert totals["wall"] <= seconds
    if (recipe := run_dir / "config.yaml").exists():  # written by a launcher; there was one
        assert totals["wall"] >= 0.75 * ((run_dir / "summary.json").stat().st_mtime - recipe.stat().st_mtime)


def steps_lost(run_dir: Path) -> list[int]:
    """For every failure, how many finished steps were done again."""
    return [finished - resumed for finished, resumed in _failures(read(run_dir))]


def assert_lost_at_most(run_dir: Path, steps: int) -> None:
    assert all(lost <= steps for lost in steps_lost(run_dir)), steps_lost(run_dir)


def _failures(events: list[Event]) -> list[tuple[int, int]]:
    """For every failure that was gone on from: the last step finished before it, and the one resumed from."""
    found: list[tuple[int, int]] = []
    finished, failed = 0, False
    for event in events:
        failed |= event.what == "failed"
        if event.what == "train":
            if failed:
                found.append((finished, event.step - 1))
            finished, failed = event.step - 1, False
        elif event.what == "checkpoint" and not failed:
            finished = event.step
    return found


def assert_names_rank_phase_and_cause(last_words: str) -> None:
    """Of a run that ended badly; where no rank is at fault they say so."""
    found = re.match(r"bagualu: failed: (rank \d+|no single rank), ([^:]+(?::\d+ in \w+\))?): (.+); \S", last_words)
    assert found, last_words


class Leftovers:
    """What a run must not leave behind: processes, threads, shared memory, files in the temporary directory.

    Processes are known by a mark in their environment, so that others on the machine do not matter; nor does shared memory
    whose owner lives.
    """

    def __init__(self, temporary: Path) -> None:
        self.temporary = temporary
        self.mark = f"BAGUALU_TEST_MARK={os.getpid()}-{time.monotonic_ns()}"
        self._threads = set(threading.enumerate())
        self._memory_before = set(_SHARED_MEMORY.glob("bagualu-*/launcher"))

    @property
    def environment(self) -> dict[str, str]:
        """For the processes that a test starts."""
        name, value = self.mark.split("=")
        return {**os.environ, name: value, "TMPDIR": str(self.temporary)}

    def processes(self) -> list[str]:
        found = []
        for folder in Path("/proc").glob("[0-9]*"):
            try:
                if self.mark.encode() in (folder / "environ").read_bytes().split(b"\0"):
                    found.append((folder / "cmdline").read_text().replace("\0", " "))
            except OSError:  # gone meanwhile, or not ours
                continue
        return found

    def assert_none(self) -> None:
        """Whatever is on its way out gets a moment."""
        deadline = time.monotonic() + 20
        while time.monotonic() < deadline and self._all():
            time.sleep(0.05)
        left = self._all()
        assert left == [], left

    def _all(self) -> list[str]:
        return [*self.processes(), *self._new_threads(), *self._memory(), *self._files()]

    def _new_threads(self) -> list[str]:
        return ["thread " + thread.name for thread in threading.enumerate() if thread not in self._threads]

    def _files(self) -> list[str]:
        return [str(path) for path in self.temporary.iterdir() if not path.name.startswith(_CACHES)]

    def _memory(self) -> list[str]:
        """Scratch folders that no launcher holds the lock of."""
        found = []
        for path in set(_SHARED_MEMORY.glob("bagualu-*/launcher")) - self._memory_before:
            with contextlib.suppress(FileNotFoundError), path.open() as lock:
                try:
                    fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
                    found.append(str(path.parent))
                except BlockingIOError:
                    continue
        return found

"""What must hold after every fault: the standing assertions of the fault-tolerance tests.

`assert_stood` makes all of them of a run that is done, wherever it was started, killed and resumed. What processes, threads and
temporary files may be left is `Leftovers`, and the last words of a run that ends badly `assert_names_rank_phase_and_cause`: the
fixtures that start runs see to both.
"""

import contextlib
import json
import multiprocessing
import re
from collections import Counter
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from bagualu.comm.group import Communicator
from bagualu.fault_tolerance.checkpoint.layout.directory import latest
from bagualu.fault_tolerance.checkpoint.reading.compare import differences
from bagualu.fault_tolerance.checkpoint.reading.load import Checkpoint
from bagualu.fault_tolerance.ledger.events import Event, read
from bagualu.fault_tolerance.ledger.totals import CATEGORIES, attribute, current
from bagualu.parallel.parallelize import Fill
from bagualu.trainer import run as whole_run
from bagualu.trainer.assemble import TrainerState, assemble
from bagualu.trainer.data.tokenised import Corpus
from bagualu.trainer.recipe.config import Recipe
from bagualu.trainer.run import train

_MEASURED = ("seconds", "per_second", "mfu")
"""Figures of the clock: their names end like this."""
_OF_SAVES = "checkpoint"
"""Figures of checkpoints, whose writing goes on beside the steps: their names begin like this."""
_OF_VALIDATION = "validation"
"""Looked at by themselves (`assert_same_validations`)."""
_OF_A_PROCESS = ("new_shapes",)
"""What counts from the beginning of a process, and so again in a run that resumes."""
_OF_TROUBLE = ("cause", "ranks", "attempts", "layers_of_stages")
"""What a step says that went well only when it was done again, or after which layers could not move."""


def assert_stood(run_dir: Path, reference: Path, lost_at_most: int, seconds: float | None = None, exact: bool = True) -> None:
    """Asserts that a run that met faults ended like `reference`, a run without faults. Both were trained by `train_noting_samples`.

    `lost_at_most`: finished steps that one failure may have cost. `seconds`: the wall time of the run, seen from outside. `exact`:
    to the bit; else up to the order of sums, since another layout has done some of it.
    """
    assert json.loads((run_dir / "summary.json").read_text())["ended"] == "done"
    (assert_same_run if exact else assert_same_curve)(run_dir, reference)
    assert_same_samples(run_dir, reference)
    assert_ledger_adds_up(run_dir, seconds)
    assert_lost_at_most(run_dir, lost_at_most)
    assert_nothing_half_written(run_dir)


def figures(run_dir: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl of the steps that count: what was computed, not when, nor what it took to get there."""
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if not _may_vary(key)} for line in lines if "discarded" not in line]


def _may_vary(key: str) -> bool:
    return key.endswith(_MEASURED) or key.startswith((_OF_SAVES, _OF_VALIDATION)) or key in (*_OF_TROUBLE, *_OF_A_PROCESS)


def validations(run_dir: Path) -> dict[int, Any]:
    """The loss on the validation samples, by step."""
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return {line["step"]: line["validation_loss"] for line in lines if "validation_loss" in line}


def assert_same_validations(run_dir: Path, reference: Path, relative: float = 0.0) -> None:
    """All of them but for one that was due in the very step at whose end the run was asked to stop: a save does not wait for it."""
    ours, theirs = validations(run_dir), validations(reference)
    stops = sum(event.what == "ended" and event.cause == "stopped" for event in read(run_dir))
    assert ours.keys() <= theirs.keys()
    assert len(theirs) - len(ours) <= stops
    for step, loss in ours.items():
        assert loss == pytest.approx(theirs[step], rel=relative, abs=0), step


def assert_same_run(run_dir: Path, reference: Path) -> None:
    """Every step once with the same figures, and the same final weights, moments and counters, all to the bit."""
    assert figures(run_dir) == figures(reference)
    assert_same_validations(run_dir, reference)
    assert_same_state(run_dir, reference)


def assert_same_state(run_dir: Path, reference: Path) -> None:
    """The same final weights, moments and counters, all to the bit."""
    ends = [latest(folder / "checkpoints") for folder in (run_dir, reference)]
    assert ends[0] is not None
    assert ends[1] is not None
    assert ends[0].name == ends[1].name
    differing = differences(ends[0], ends[1])
    assert differing == [], differing


def assert_same_curve(run_dir: Path, reference: Path, relative: float = 1e-9) -> None:
    """Every step once, with the figures, final weights and moments that differ at most by the order of sums, in float64 by the
    fraction `relative`."""
    ours, theirs = figures(run_dir), figures(reference)
    assert [line["step"] for line in ours] == [line["step"] for line in theirs]
    for key in ("loss", "grad_norm", "lr", "tokens"):
        np.testing.assert_allclose([line[key] for line in ours], [line[key] for line in theirs], rtol=relative, err_msg=key)
    assert_same_validations(run_dir, reference, relative)
    ends = [newest_tensors(folder) for folder in (run_dir, reference)]
    assert ends[0].keys() == ends[1].keys()
    for name, tensor in ends[0].items():
        torch.testing.assert_close(tensor, ends[1][name], rtol=relative, atol=relative / 1000, msg=name)


def newest_tensors(run_dir: Path) -> dict[str, torch.Tensor]:
    """Returns all tensors of the newest checkpoint of a run, weights and moments, by name."""
    newest = latest(run_dir / "checkpoints")
    assert newest is not None
    checkpoint, whole = Checkpoint(newest), {}
    for name, (shape, dtype) in checkpoint.tensors.items():
        whole[name] = torch.empty(shape, dtype=dtype)
        checkpoint.read(name, (0,) * len(shape), whole[name])
    return whole


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


def train_noting_samples(
    recipe: Recipe, communicator: Communicator, stop: Any, scratch: Path | None = None, notes: Path | None = None
) -> dict[str, Any]:
    """An entrypoint: the trainer, with a note of every sample that a rank takes, in `notes` or the run directory.

    What it notes is for `assert_stood`.
    """

    def assemble_noting(recipe: Recipe, communicator: Communicator, corpus: Corpus, fill: Fill | None) -> TrainerState:
        state = assemble(recipe, communicator, corpus, fill)
        path = (notes or Path(recipe.run.dir)) / f"samples-{communicator.rank}.jsonl"
        state.batches = _Noting(state.batches, path)  # type: ignore[assignment]
        return state

    with known_ceiling():
        return train(recipe, communicator, stop, scratch, assemble_noting)


@contextlib.contextmanager
def known_ceiling() -> Iterator[None]:
    """Within this context, a rank that is a process does not measure what its matrix products reach, which takes 0.2 s at each
    start of a run and at its end. Ranks that are threads share what this replaces, so a test replaces it before it starts them."""
    with pytest.MonkeyPatch.context() as patch:
        if multiprocessing.parent_process() is not None:
            patch.setattr(whole_run, "matmul_ceiling", lambda *_: 1e9)
        yield


def go_on(communicator: Communicator, recipe: Recipe) -> dict[str, Any]:
    """For tests/harness.py: a rank of such a run, from its beginning or, with checkpoint.resume=true, from where it was."""
    return train_noting_samples(recipe, communicator, lambda: False)


def samples(run_dir: Path) -> dict[tuple[int, int], int]:
    """Sample by step (from 1) and position in the global batch. Whenever a step was done again it had the same ones."""
    used: dict[tuple[int, int], int] = {}
    for path in run_dir.glob("samples-*.jsonl"):
        for line in path.read_text().splitlines():
            try:
                entry = json.loads(line)
            except ValueError:  # cut short by a kill, and done again
                continue
            for position, sample in enumerate(entry["ids"], entry["start"]):
                assert used.setdefault((entry["step"], position), sample) == sample
    return used


def assert_same_samples(run_dir: Path, reference: Path) -> None:
    """Each step that counts used its whole global batch, the one of the undisturbed run, and no sample twice in an epoch."""
    steps = {line["step"] for line in figures(reference)}
    used, expected = ({at: one for at, one in samples(folder).items() if at[0] in steps} for folder in (run_dir, reference))
    assert used == expected
    batch = 1 + max(position for _, position in used)
    assert len(used) == len(steps) * batch
    times = Counter(used.values()).values()
    assert max(times) - min(times) <= 1


def assert_nothing_half_written(run_dir: Path) -> None:
    """What the next start would have to clear away."""
    left = [path.name for path in run_dir.rglob("*") if path.name.startswith((".saving-", ".removing-")) or ".tmp" in path.name]
    assert left == []


def assert_ledger_adds_up(run_dir: Path, seconds: float | None = None) -> None:
    """Every second in exactly one category; together no more than `seconds`, the wall time seen from outside, and at least three
    quarters of what lies between the files that a launch begins and ends with."""
    totals = json.loads((run_dir / "summary.json").read_text())["ledger"]
    events = current(read(run_dir))
    assert totals == {name: value for name, value in attribute(events).items() if name in totals}
    assert abs(sum(totals[name] for name in CATEGORIES) - totals["wall"]) < 1e-6
    done = sum(after.monotonic - event.monotonic for event, after in pairwise(events) if event.cause == "done")
    assert abs(totals["wall"] - (events[-1].monotonic - events[0].monotonic - done)) < 1e-5
    assert totals["productive"] > 0
    if seconds is not None:
        assert totals["wall"] <= seconds
    if any(event.what == "launched" for event in events):  # what torchrun does before rank 0 is there, nobody enters
        recipe = run_dir / "config.yaml"
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
    """Asserts that the last line of a failed run names phase and cause, and the rank at fault or that there is none."""
    found = re.match(r"bagualu: failed: (rank \d+|no single rank), ([^:]+(?::\d+ in \w+\))?): (.+); \S", last_words)
    assert found, last_words

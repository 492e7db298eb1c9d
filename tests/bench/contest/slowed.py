"""A rank that gets slow while a run goes on: steps before, while its layers have not moved yet, and after."""

import statistics
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bagualu.trainer.recipe.compose import compose
from contest.duty import Slowed
from contest.forecasts import forecasts
from contest.named import process_file
from contest.report import spread
from contest.runs import Ended, lines, train

WORDS = ["recipe=bench_dense", "model.layers=16", "model.hidden=256", "model.heads=4", "model.ffn=688", "model.vocab=4096",
         "data.sequence_length=128", "launch.workers=2", "launch.threads=1", "parallel.pipeline=2", "train.micro_batch=1",
         "straggler.ratio=0", "restart.hang_seconds=0"]  # fmt: skip
"""Many layers, so that there is a split for any speed; and nobody who takes a rank that stands still for a moment to be hung."""
WATCH = ["parallel.balance=measured", "parallel.rebalance.every=2", "parallel.rebalance.windows=2",
         "parallel.rebalance.threshold=0.1"]  # fmt: skip
SLOW_RANK = 1


@dataclass(frozen=True)
class Plan:
    """Steps of a run, and when rank 1 gets slow."""

    warmup: int
    before: int
    slow: int
    """Steps after that."""
    speed: float
    """Of rank 1 from then on."""

    @property
    def steps(self) -> int:
        return self.warmup + self.before + self.slow


def compare(plan: Plan, rounds: int, folder: Path) -> list[dict[str, Any]]:
    """Rows, by turn: the run whose layers move, by phase, then static splits at the speeds of its end."""
    words, still = [*WORDS, *WATCH, f"data.cache={folder / 'cache'}"], Plan(plan.warmup, 0, max(6, plan.slow // 3), plan.speed)
    rows: list[dict[str, Any]] = []
    for turn in range(rounds):
        moving = _run(words, plan, folder / f"moving-{turn}")
        if turn == 0:
            table = forecasts(compose([*words, f"train.steps={plan.steps}"]), folder / "cache")
            candidates = near(table.best([1.0, plan.speed]))
        rows += phases(moving, table.best([1.0, 1.0]), plan.warmup, plan.warmup + plan.before)
        for counts in candidates:
            run = _run([*WORDS, f"parallel.balance={counts}"], still, folder / f"static-{turn}-{counts[0]}")
            rows.append(row("static", "slow", counts, run.step_seconds[still.warmup + 1 :]))
    return with_ratio(merged(rows))


def near(counts: list[int]) -> list[list[int]]:
    """Splits over two stages: one layer less on the first, these, one and two more, for a process that is stopped also keeps the
    other one waiting for its messages."""
    first, second = counts
    return [[first + more, second - more] for more in (-1, 0, 1, 2) if first + more > 0 and second - more > 0]


def phases(run: Ended, counts: list[int], warmup: int, slow_from: int) -> list[dict[str, Any]]:
    """Rows of a run that begins with the split `counts` and whose rank gets slow within step `slow_from` (from 0): steps before,
    while it is slow and its layers have not moved, after the last move. The step in which it gets slow is in none of them, the move
    itself between steps."""
    before, slow, after = list[float](), list[float](), list[float]()
    start, moves, move_seconds = counts, 0, 0.0
    for place, record in enumerate(run.records):
        if place < slow_from:
            before += [record["step_seconds"]] * (place >= warmup)
        elif place > slow_from:
            (after if moves else slow).append(record["step_seconds"])
        if record.get("layers_of_stages", counts) != counts:
            counts = record["layers_of_stages"]
            if place < slow_from:
                start = counts
            else:
                moves, move_seconds, after = moves + 1, move_seconds + record["move_seconds"], []
    rows = [row("moving", "before", start, before), row("moving", "slow", start, slow)]
    return rows if not moves else [*rows, row("moving", "moved", counts, after, moves, move_seconds / moves)]


def row(
    run: str, phase: str, counts: list[int], seconds: list[float], moves: int = 0, move_seconds: float | None = None
) -> dict[str, Any]:
    return {
        "run": run, "phase": phase, "layers": ",".join(map(str, counts)), "moves": moves, "move s": move_seconds, "steps": 0,
        "step s": None, "min..max": "", "x best static": None, "seconds": seconds,
    }  # fmt: skip


def merged(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows of the same phase and split put together, with the figures of their steps. One without a step is left out."""
    found: dict[tuple[str, str, str], dict[str, Any]] = {}
    for one in rows:
        if one["seconds"]:
            known = found.setdefault((one["run"], one["phase"], one["layers"]), {**one, "seconds": []})
            known["seconds"] = known["seconds"] + one["seconds"]
    for one in found.values():
        seconds = one["seconds"]
        one |= {"steps": len(seconds), "step s": statistics.median(seconds), "min..max": spread(seconds)}
    return sorted(found.values(), key=lambda one: one["run"])


def with_ratio(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Steps in which a rank is slow, against the quickest static split."""
    best = min((one["step s"] for one in rows if one["run"] == "static"), default=None)
    for one in rows:
        if best is not None and one["phase"] != "before":
            one["x best static"] = one["step s"] / best
    return rows


def _run(words: list[str], plan: Plan, folder: Path) -> Ended:
    """A run whose rank 1 gets slow after `plan.warmup + plan.before` steps, until it ends."""

    def meanwhile(launcher: subprocess.Popen[bytes]) -> None:
        while len(lines(folder / "metrics.jsonl")) < plan.warmup + plan.before:
            if launcher.poll() is not None:
                return
            time.sleep(0.01)
        process = int((folder / process_file(SLOW_RANK)).read_text(encoding="utf-8"))
        with Slowed(process, plan.speed):
            while len(lines(folder / "metrics.jsonl")) < plan.steps and launcher.poll() is None:
                time.sleep(0.05)

    return train([*words, f"train.steps={plan.steps}"], folder, folder.with_suffix(".log"), meanwhile=meanwhile)

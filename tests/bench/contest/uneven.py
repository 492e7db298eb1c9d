"""A model whose layers are not alike: the split by measured costs against the one by count, and what of the gain came true."""

import statistics
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bagualu.trainer.recipe.compose import compose
from bagualu.trainer.recipe.config import Recipe
from contest.forecasts import Forecasts, forecasts, uniform
from contest.report import spread
from contest.runs import Ended, train

SIZE = ["recipe=bench_dense", "data.sequence_length=128", "data.global_batch=16"]
CASES = {
    "head": ["model.layers=8", "model.vocab=32768"],
    "mixture": ["model.layers=8", "model.moe.experts=4", "model.moe.top_k=2", "model.moe.ffn=4032", "model.moe.every=8"],
}
"""head: one that weighs several layers. mixture: the last layer takes about four times as long as the others, for single layers of
another width are no option of the model."""
BALANCES = ("uniform", "measured")
TWO = ["launch.workers=2", "launch.threads=1", "parallel.pipeline=2", "train.micro_batch=1", "parallel.rebalance.every=0"]


@dataclass
class Steps:
    """What was seen of one split."""

    counts: list[int] = field(default_factory=list)
    """Layers of the stages."""
    seconds: list[float] = field(default_factory=list)
    """Of every timed step."""
    passes_seconds: list[float] = field(default_factory=list)
    """Of the recorded step of every run."""

    def add(self, run: Ended, warmup: int) -> None:
        self.counts = run.summary["layers_of_stages"]
        self.seconds += run.step_seconds[warmup:]
        self.passes_seconds.append(run.passes_seconds)


def compare(case: str, rounds: int, warmup: int, steps: int, folder: Path) -> list[dict[str, Any]]:
    """Rows for uniform and measured, which take turns, on two processes of one thread."""
    words = [*SIZE, *CASES[case], *TWO, f"data.cache={folder / 'cache'}", f"train.steps={warmup + steps}"]

    def run(balance: str, turn: int) -> Ended:
        name = f"{case}-{balance}-{turn}"
        return train([*words, f"parallel.balance={balance}"], folder / name, folder / f"{name}.log")

    seen = alternate(run, rounds, warmup)
    recipe = compose(words)
    return rows_of(case, recipe, seen, forecasts(recipe, folder / "cache"))


def alternate(run: Callable[[str, int], Ended], rounds: int, warmup: int) -> dict[str, Steps]:
    """`run(balance, turn)` in turns."""
    seen = {balance: Steps() for balance in BALANCES}
    for turn in range(rounds):
        for balance, steps in seen.items():
            steps.add(run(balance, turn), warmup)
    return seen


def rows_of(case: str, recipe: Recipe, seen: dict[str, Steps], table: Forecasts) -> list[dict[str, Any]]:
    """predicted s: what the table says that the passes of a step take, recorded ones beside it. reached: the share of the gain that
    it predicts which whole steps have gained, optimizer and all."""
    predicted = {name: table.of(steps.counts) for name, steps in seen.items()}
    assert seen["uniform"].counts == uniform(recipe)
    tokens = recipe.data.global_batch * recipe.data.sequence_length
    rows = []
    for name, steps in seen.items():
        median = statistics.median(steps.seconds)
        gain, promised = statistics.median(seen["uniform"].seconds) / median, predicted["uniform"] / predicted[name]
        rows.append({
            "case": case, "split": name, "layers": ",".join(map(str, steps.counts)), "tokens/s": tokens / median, "step s": median,
            "min..max": spread(steps.seconds), "passes s": statistics.median(steps.passes_seconds), "predicted s": predicted[name],
            "gain": gain, "predicted gain": promised, "reached": (gain - 1) / (promised - 1) if promised > 1 else None,
            "seconds": steps.seconds,
        })  # fmt: skip
    return rows

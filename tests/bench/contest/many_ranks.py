"""Pipelines of many ranks on one machine: threads of this process whose layers sleep."""

import sys
from pathlib import Path
from typing import Any

from bagualu.comm import simulated
from bagualu.comm.group import Communicator
from bagualu.trainer import run
from bagualu.trainer.recipe.compose import compose
from contest import bubbles, slowed, uneven
from contest.forecasts import forecasts, schedule_of
from contest.runs import QUIET, Ended, read
from contest.sleeping import Sleepers, Slow

WORDS = ["recipe=bench_dense", "model.hidden=8", "model.heads=2", "model.ffn=8", "model.vocab=16",
         "data.sequence_length=8", "train.micro_batch=1", "train.dtype=float32", "comm.backend=simulated", "straggler.ratio=0",
         "guard.check_every=0", *QUIET]  # fmt: skip
"""Tensors of a few bytes, so that ranks which share two cores do nothing but sleep and send."""
WATCH = ["parallel.balance=measured", "parallel.rebalance.every=2", "parallel.rebalance.windows=2"]


def train(words: list[str], sleepers: Sleepers, folder: Path) -> Ended:
    recipe = compose([*WORDS, f"run.dir={folder}", *words])
    folder.mkdir(parents=True)
    switch = sys.getswitchinterval()
    sys.setswitchinterval(1e-4)  # so that no rank holds up the others for long

    def rank(communicator: Communicator) -> None:
        sleepers.join(communicator.monitor)
        run.train(recipe, communicator)

    try:
        with sleepers.installed():
            simulated.run(recipe.world_size(), rank)
    finally:
        sys.setswitchinterval(switch)
    return read(folder)


def bubble(stages: int, names: list[str], nap_seconds: float, folder: Path) -> list[dict[str, Any]]:
    """Two layers on each rank and twice as many micro-batches as ranks, one recorded step of each schedule."""
    size = [f"parallel.pipeline={stages}", f"model.layers={2 * stages}", f"data.global_batch={2 * stages}", "train.steps=3"]
    rows = []
    for name in names:
        words = [*size, f"parallel.schedule={name}", "parallel.balance=uniform"]
        ended = train(words, Sleepers(nap_seconds, nap_seconds, 0.0), folder / name)
        rows.append(bubbles.row(name, schedule_of(compose([*WORDS, *words])), [ended.passes]))
    return rows


def uneven_layers(stages: int, nap_seconds: float, rounds: int, steps: int, folder: Path) -> list[dict[str, Any]]:
    """Every third layer a mixture that takes three times as long as the others, and a head of three layers: measured against
    uniform."""
    sleepers = Sleepers(nap_seconds, 3 * nap_seconds, 3 * nap_seconds)
    words = [f"parallel.pipeline={stages}", f"model.layers={4 * stages}", f"data.global_batch={2 * stages}",
             "model.moe.experts=2", "model.moe.top_k=1", "model.moe.ffn=8", "model.moe.every=3", "parallel.rebalance.every=0",
             f"data.cache={folder / 'cache'}", f"train.steps={1 + steps}"]  # fmt: skip

    def one(balance: str, turn: int) -> Ended:
        return train([*words, f"parallel.balance={balance}"], sleepers, folder / f"{balance}-{turn}")

    seen = uneven.alternate(one, rounds, warmup=1)
    recipe = compose([*WORDS, *words])
    return uneven.rows_of(f"{stages} stages", recipe, seen, forecasts(recipe, folder / "cache"))


def slow_rank(stages: int, nap_seconds: float, folder: Path) -> list[dict[str, Any]]:
    """The rank in the middle goes down to half speed after 4 steps; then a static split for those speeds."""
    slow, steps = stages // 2, 16
    words = [f"parallel.pipeline={stages}", f"model.layers={4 * stages}", f"data.global_batch={2 * stages}",
             f"data.cache={folder / 'cache'}"]  # fmt: skip
    sleepers = Sleepers(nap_seconds, nap_seconds, nap_seconds, Slow(slow, 5, 2.0))
    moving = train([*words, *WATCH, f"train.steps={steps}"], sleepers, folder / "moving")
    table = forecasts(compose([*WORDS, *words, *WATCH]), folder / "cache")
    counts = table.best([0.5 if rank == slow else 1.0 for rank in range(stages)])
    sleepers.slow = Slow(slow, 1, 2.0)
    still = train([*words, f"parallel.balance={counts}", "train.steps=5"], sleepers, folder / "static")
    rows = slowed.phases(moving, table.best([1.0] * stages), 1, 4)
    return slowed.with_ratio(slowed.merged([*rows, slowed.row("static", "slow", counts, still.step_seconds[1:])]))

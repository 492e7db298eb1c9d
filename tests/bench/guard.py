"""What the guard's checks cost: steps of a recipe on one rank with guard.check_every=0 and =1, in turn, and the seal alone.

    python tests/bench/guard.py --recipe bench_dense --json out.json

A check step takes the seal twice (after the update before it, and before its own) and compares the working copies.
"""

import argparse
import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

from bagualu.comm import simulated
from bagualu.comm.group import Communicator
from bagualu.trainer.assemble import assemble
from bagualu.trainer.data.corpus import prepare
from bagualu.trainer.recipe.compose import compose
from bagualu.trainer.step import train_step

WARM_UP = 3


def seconds_of(function: Callable[[], Any]) -> float:
    started = time.perf_counter()
    function()
    return time.perf_counter() - started


def measure(communicator: Communicator, recipe: str, threads: int, rounds: int) -> dict[str, Any]:
    torch.set_num_threads(threads)
    composed = compose([f"recipe={recipe}", "comm.backend=simulated", "parallel.data=1"])
    parts = assemble(composed, communicator, prepare(composed.data, composed.model.vocab))
    guard, step = parts.guard, 0
    steps: dict[int, list[float]] = {0: [], 1: []}
    for turn in range(WARM_UP + rounds):
        for every, taken in steps.items():
            guard.config.check_every = every
            guard.expect(step + 1)  # so that the step begins as one after another of its kind
            seconds = seconds_of(partial(train_step, parts, step))
            step += 1
            if turn >= WARM_UP:
                taken.append(seconds)
    seals = [seconds_of(guard._damage.seal) for _ in range(2 * rounds)]
    unchecked, checked = (statistics.median(steps[every]) for every in (0, 1))
    state = sum(tensor.nbytes for shard in parts.engine.optimizer.shards() for tensor in shard.values())
    return {
        "recipe": recipe, "threads": threads, "state_bytes": state, "step_seconds": unchecked, "checked_step_seconds": checked,
        "ratio": checked / unchecked, "seal_seconds": min(seals), "two_seals_of_a_step": 2 * min(seals) / min(steps[0]),
        "samples": {"unchecked": steps[0], "checked": steps[1], "seals": seals},
        "machine": platform.processor() or platform.machine(), "cores": len(os.sched_getaffinity(0)), "torch": torch.__version__,
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", default="bench_dense")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--rounds", type=int, default=8, help="timed steps of each kind (default 8)")
    parser.add_argument("--json", type=Path, metavar="FILE")
    given = parser.parse_args()
    (found,) = simulated.run(1, lambda rank: measure(rank, given.recipe, given.threads, given.rounds), 3600.0, given.threads)
    for name, value in found.items():
        if name != "samples":
            print(f"{name:<22}{value:>14.4g}" if isinstance(value, float) else f"{name:<22}{value:>14}")
    if given.json:
        given.json.write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()

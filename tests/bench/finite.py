"""What it costs to look at every update for values that are not finite: its own time in steps of a recipe on one rank.

    python tests/bench/finite.py --recipe bench_dense --json out.json

The share is the time inside the look itself over the time of the step it is part of; the baseline, steps whose updates nobody looks
at, alternates with it. Medians, since other programs may have the machine at times; with --threads 1 they are of the thread's
processor time, on which those have less influence.
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

WARM_UP = 1


class Stopwatch:
    """Sums up what calls of a function take."""

    def __init__(self, function: Callable[..., Any], clock: Callable[[], float]) -> None:
        self._function, self._clock = function, clock
        self.seconds = 0.0

    def __call__(self, *args: Any) -> Any:
        started = self._clock()
        try:
            return self._function(*args)
        finally:
            self.seconds += self._clock() - started

    def take(self) -> float:
        seconds, self.seconds = self.seconds, 0.0
        return seconds


def measure(communicator: Communicator, overrides: list[str], threads: int, rounds: int) -> dict[str, Any]:
    torch.set_num_threads(threads)
    composed = compose([*overrides, "comm.backend=simulated", "parallel.data=1"])
    state = assemble(composed, communicator, prepare(composed.data, composed.model.vocab))
    optimizer: Any = state.engine.optimizer
    clock = time.thread_time if threads == 1 else time.perf_counter
    look, spoilt, update = (Stopwatch(one, clock) for one in (optimizer._look, optimizer.spoilt, optimizer.step))
    optimizer.spoilt, optimizer.step = spoilt, update
    shares, steps, updates = [], {"looked_at": [], "baseline": []}, {"looked_at": [], "baseline": []}  # type: ignore[var-annotated]
    step = 0
    for turn in range(WARM_UP + rounds):
        for kind in steps:
            optimizer._look = look if kind == "looked_at" else lambda *_: None
            started = clock()
            train_step(state, step)
            seconds, own, updating = clock() - started, look.take() + spoilt.take(), update.take()
            step += 1
            if turn >= WARM_UP:
                steps[kind].append(seconds)
                updates[kind].append(updating)
                if kind == "looked_at":
                    shares.append(own / seconds)
    middle = statistics.median
    return {
        "recipe": " ".join(overrides), "threads": threads, "share_of_a_step": middle(shares), "least_share": min(shares),
        "step_seconds": middle(steps["looked_at"]), "update_seconds": middle(updates["looked_at"]),
        "update_ratio_to_baseline": middle(updates["looked_at"]) / middle(updates["baseline"]),
        "samples": {"shares": shares, "steps": steps, "updates": updates},
        "machine": platform.processor() or platform.machine(), "cores": len(os.sched_getaffinity(0)), "torch": torch.__version__,
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", default="bench_dense")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--rounds", type=int, default=8, help="timed steps of each kind (default 8)")
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("overrides", nargs="*", help="further keys, e.g. train.dtype=float32")
    given = parser.parse_args()
    run = partial(measure, overrides=[f"recipe={given.recipe}", *given.overrides], threads=given.threads, rounds=given.rounds)
    (found,) = simulated.run(1, lambda rank: run(rank), 3600.0, given.threads)
    for name, value in found.items():
        if name != "samples":
            print(f"{name:<26}{value:>14.4g}" if isinstance(value, float) else f"{name:<26}{value:>14}")
    if given.json:
        given.json.write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()

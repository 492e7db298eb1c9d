"""What a step takes on one GPU, with kernels that give the same bits every time and with any; and which kernels it consists of.

    python tests/bench/gpu.py recipe=bench_dense_1b
    python tests/bench/gpu.py recipe=bench_moe_2b --rounds 3 --steps 6 --json moe.json

Both settings take turns in one process, on one model. Words without dashes are overrides of the recipe.
"""

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from contest.environment import machine, versions
from contest.report import table_of
from torch.profiler import ProfilerActivity, profile

from bagualu.comm.group import connect
from bagualu.comm.world import World
from bagualu.trainer.assemble import TrainerState, assemble
from bagualu.trainer.costs.throughput import synchronize
from bagualu.trainer.data.corpus import prepare
from bagualu.trainer.models.decoder.flops import model_flops_per_token
from bagualu.trainer.process import environment
from bagualu.trainer.recipe.choose_backend import choose_backend
from bagualu.trainer.recipe.compose import compose
from bagualu.trainer.recipe.config import LaunchConfig
from bagualu.trainer.step import train_step

SHOWN = 30


class Steps:
    """One run, step by step."""

    def __init__(self, state: TrainerState) -> None:
        self.state, self.done = state, 0

    def seconds(self, count: int) -> list[float]:
        """What each of the next `count` steps takes, until the device has done it."""
        found = []
        for _ in range(count):
            started = time.perf_counter()
            train_step(self.state, self.done)
            synchronize(self.state.device)
            found.append(time.perf_counter() - started)
            self.done += 1
        return found


def compare(steps: Steps, rounds: int, count: int) -> list[dict[str, Any]]:
    recipe = steps.state.recipe
    tokens = recipe.data.global_batch * recipe.data.sequence_length
    flops = tokens * model_flops_per_token(recipe.model, recipe.data.sequence_length)
    samples: dict[bool, list[float]] = {True: [], False: []}
    for _ in range(rounds):
        for deterministic in samples:
            torch.use_deterministic_algorithms(deterministic)
            steps.seconds(2)
            samples[deterministic] += steps.seconds(count)
    return [
        {
            "deterministic": str(deterministic).lower(), "step seconds": (median := statistics.median(seconds)),
            "tokens/s": tokens / median, "TFLOP/s": flops / median / 1e12, "samples": seconds,
        }
        for deterministic, seconds in samples.items()
    ]  # fmt: skip


def kernels(steps: Steps) -> list[dict[str, Any]]:
    """Returns the kernels of one step that take longest."""
    torch.use_deterministic_algorithms(True)
    with profile(activities=[ProfilerActivity.CUDA, ProfilerActivity.CPU]) as profiled:
        steps.seconds(1)
    found = [event for event in profiled.key_averages() if event.self_device_time_total and not event.key.startswith("aten::")]
    found.sort(key=lambda event: -event.self_device_time_total)
    return [{"kernel": e.key[:90], "ms": e.self_device_time_total / 1e3, "times": e.count} for e in found[:SHOWN]]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("overrides", nargs="+", metavar="KEY=VALUE")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--steps", type=int, default=5, help="timed steps of a turn (default 5)")
    parser.add_argument("--json", type=Path, metavar="FILE")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        recipe = compose([*options.overrides, f"run.dir={folder}/run"])
        communicator = connect(choose_backend(recipe, 1)[0].comm.backend, World(0, 1))
        steps = Steps(assemble(recipe, communicator, prepare(recipe.data, recipe.model.vocab)))
        steps.seconds(3)
        compared = compare(steps, options.rounds, options.steps)
        print(table_of(compared), end="\n\n")
        longest = kernels(steps)
        print(table_of(longest) if longest else "no kernels of a GPU")
    document = {"machine": machine(steps.state.device.type), "versions": versions(), "steps": compared, "kernels": longest}
    if options.json:
        options.json.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    communicator.close()
    return 0


if __name__ == "__main__":
    os.environ.update(environment.variables(LaunchConfig(), 1))
    sys.exit(main())

"""What the step guard, at its defaults, makes of text that is easy and hard in turn, and of corruption in the middle of it.

    python tests/bench/guard_mixtures.py --json out.json            # all mixtures, 3 seeds: about 10 minutes on one core
    python tests/bench/guard_mixtures.py --mixtures blocks --seeds 1

Each mixture is trained with the guard off, with the guard on, and with the guard on and corruption planted. Reported: steps left
out at the end, steps whose samples were deferred for a while, the final loss on each part against the guard off, and how many of
the planted corruptions were seen. The model is small (1 layer of 32), float32, one rank.

Easy text repeats one of four patterns of eight tokens. Hard text is a Markov chain over 64 tokens, each of which has four
successors (1.2 nats a token at best); or, in `noise`, uniform random tokens of a quarter of the vocabulary (4.2 nats).
"""

import argparse
import json
import math
import os
import time
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bagualu.comm import simulated
from bagualu.comm.group import Communicator
from bagualu.fault_tolerance.guard.verdict import GuardAction
from bagualu.parallel.pipeline.program import program
from bagualu.parallel.pipeline.runtime import MicroBatch
from bagualu.parallel.pipeline.schedules.schedule import forward_only, with_messages
from bagualu.trainer.assemble import TrainerState, assemble
from bagualu.trainer.data.corpus import prepare
from bagualu.trainer.recipe.compose import compose
from bagualu.trainer.recipe.config import Recipe
from bagualu.trainer.step import train_step

VOCAB, LENGTH, BATCH = 256, 32, 8
RECIPE = [
    "recipe=tiny_dense", "model.layers=1", "model.hidden=32", "model.heads=2", "model.kv_heads=2", "model.ffn=64",
    f"model.vocab={VOCAB}", "data.source=random", f"data.sequence_length={LENGTH}", f"data.global_batch={BATCH}",
    f"train.micro_batch={BATCH}", "parallel.data=1", "parallel.pipeline=1",
    "train.validation_sequences=0", "comm.backend=simulated", "train.dtype=float32", "optim.lr=3e-3",
    "optim.warmup_steps=20",
]  # fmt: skip
SOON = 10
"""Steps after which a flipped weight must have been seen: a check comes by then."""
EVALUATED = 64
"""Sequences of each part behind a final loss."""
Part = Callable[[np.random.Generator], np.ndarray]


def easy(draw: np.random.Generator) -> np.ndarray:
    pattern = np.random.default_rng([7, draw.integers(4)]).integers(0, 64, 8)
    return np.resize(pattern, LENGTH + 8)[(start := draw.integers(8)) : start + LENGTH + 1]


def chain(draw: np.random.Generator) -> np.ndarray:
    successors = np.random.default_rng(8).integers(0, 64, (64, 4))
    tokens = [draw.integers(64)]
    for choice in draw.choice(4, LENGTH, p=[0.5, 0.25, 0.15, 0.1]):
        tokens.append(successors[tokens[-1], choice])
    return 64 + np.array(tokens)


def noise(draw: np.random.Generator) -> np.ndarray:
    return 128 + draw.integers(0, 64, LENGTH + 1)


def by_batch(share: float) -> Callable[[int, np.random.Generator], list[bool]]:
    return lambda step, draw: [bool(draw.random() < share)] * BATCH


def by_sample(share: float) -> Callable[[int, np.random.Generator], list[bool]]:
    return lambda step, draw: [bool(draw.random() < share) for _ in range(BATCH)]


def in_blocks(length: int) -> Callable[[int, np.random.Generator], list[bool]]:
    return lambda step, draw: [step // length % 2 == 1] * BATCH


MIXTURES: dict[str, tuple[Callable[[int, np.random.Generator], list[bool]], Part]] = {
    "95/5 by sample": (by_sample(0.05), chain),
    "80/20 by batch": (by_batch(0.2), chain),
    "blocks": (in_blocks(100), chain),
}
MORE: dict[str, tuple[Callable[[int, np.random.Generator], list[bool]], Part]] = {
    "93/7 by batch": (by_batch(0.07), chain),
    "95/5 by batch": (by_batch(0.05), chain),
    "99/1 by batch": (by_batch(0.01), chain),
    "long blocks": (in_blocks(400), chain),
    "late": (lambda step, draw: [step >= 900] * BATCH, chain),
    "every 14th": (lambda step, draw: [step % 14 == 0] * BATCH, chain),
    "noise": (by_batch(0.07), noise),
    "easy only": (by_batch(0.0), chain),
    "hard only": (by_batch(1.0), chain),
}


class Mixture:
    """Takes the place of a run's batches; a function of (seed, step) like them. `garbled`: steps (from 0) of random tokens."""

    def __init__(self, name: str, seed: int) -> None:
        self._which, self._hard = {**MIXTURES, **MORE}[name]
        self._seed = seed
        self.garbled: set[int] = set()

    def batch(self, step: int, start: int, count: int) -> tuple[torch.Tensor, torch.Tensor]:
        draw = np.random.default_rng([self._seed, step])
        hard = self._which(step, draw)
        rows = np.stack([(self._hard if one else easy)(draw) for one in hard])
        if step in self.garbled:
            rows = draw.integers(0, VOCAB, rows.shape)
        return tensors(rows[start : start + count])

    def parts(self) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
        """Sequences of each part that no step has seen."""
        draw = np.random.default_rng([self._seed, 10**9])
        kinds = {"easy": easy, "hard": self._hard}
        return {name: tensors(np.stack([part(draw) for _ in range(EVALUATED)])) for name, part in kinds.items()}


def tensors(rows: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
    both = torch.from_numpy(rows.astype(np.int64))
    return both[:, :-1].contiguous(), both[:, 1:].contiguous()


@dataclass
class Plant:
    """One corruption at `step` (from 0). garbled: random tokens, in every attempt. The others strike in the first attempt and
    flip the top bit of a float32's exponent: of the gradient's largest or smallest element, of the largest weight, of the loss."""

    step: int
    kind: str


def flip(values: torch.Tensor, place: int) -> None:
    values.view(torch.int32)[place] ^= 1 << 30


@dataclass
class Planted:
    """Watches the monitor and strikes; keeps the state before a weight is struck, in place of a checkpoint."""

    parts: TrainerState
    plants: dict[int, Plant]
    struck: set[int] = field(default_factory=set)
    saved: tuple[int, list[torch.Tensor], Any] | None = None

    def at(self, point: str, step: int) -> None:
        plant, bucket = self.plants.get(step - 1), self.parts.engine.buckets[0]
        if plant is None or plant.step in self.struck or plant.kind == "garbled":
            return
        if point == "forward" and plant.kind == "weight":
            self.saved = step - 1, [tensor.clone() for tensor in self._state()], deepcopy(self.parts.guard.memory)
            flip(bucket.weights.view(-1), int(bucket.weights.view(-1).abs().argmax()))
        elif point == "agree" and "gradient" in plant.kind:
            size = bucket.shard_gradients.view(-1).abs()
            place = size.argmax() if "largest" in plant.kind else size.masked_fill(size == 0, 9).argmin()
            flip(bucket.shard_gradients.view(-1), int(place))
        else:
            return
        self.struck.add(plant.step)

    def spoilt_loss(self, run: Callable[..., Any]) -> Callable[..., Any]:
        def spoilt(*given: Any, **named: Any) -> Any:
            totals, step = run(*given, **named), self.parts.mesh.monitor.step - 1
            if step in self.plants and self.plants[step].kind == "loss" and step not in self.struck:
                self.struck.add(step)
                totals = replace(totals, loss=totals.loss * 2.0**128)
            return totals

        return spoilt

    def go_back(self) -> int:
        assert self.saved is not None
        step, state, memory = self.saved
        for tensor, before in zip(self._state(), state, strict=True):
            tensor.copy_(before)
        self.parts.guard.memory = deepcopy(memory)
        self.parts.guard.expect(step + 1)
        return step

    def _state(self) -> list[torch.Tensor]:
        shards = [tensor for shard in self.parts.engine.optimizer.shards() for tensor in shard.values()]
        return [*shards, *(bucket.weights for bucket in self.parts.engine.buckets)]

    def waits(self, what: str | None) -> None:
        return None


@dataclass
class Outcome:
    left_out: int
    deferred: int
    losses: dict[str, float]
    missed: list[str]
    seconds: float


def losses(parts: TrainerState, mixture: Mixture) -> dict[str, float]:
    """Nats per token of each part."""
    found = {}
    for name, (inputs, labels) in mixture.parts().items():
        micro = [MicroBatch(inputs[at : at + BATCH], labels[at : at + BATCH]) for at in range(0, EVALUATED, BATCH)]
        schedule = with_messages(forward_only(parts.mesh.placement, len(micro)))
        found[name] = float(parts.runner.run(program(schedule, 0), micro, seeds=None).loss) / (EVALUATED * LENGTH)
    return found


def run_one(communicator: Communicator, name: str, seed: int, steps: int, guard: bool, plants: list[Plant]) -> Outcome:
    off = [] if guard else ["guard.spike_factor=0", "guard.loss_spike_factor=0"]
    recipe: Recipe = compose([*RECIPE, f"train.steps={steps}", f"run.seed={seed}", *off])
    parts = assemble(recipe, communicator, prepare(recipe.data, recipe.model.vocab))
    mixture: Any = Mixture(name, seed)
    mixture.garbled = {plant.step for plant in plants if plant.kind == "garbled"}
    parts.batches = mixture
    planted = Planted(parts, {plant.step: plant for plant in plants})
    parts.mesh.monitor.observers.append(planted)
    parts.runner.run = planted.spoilt_loss(parts.runner.run)  # type: ignore[method-assign]
    seen: set[int] = set()
    deferred = step = 0
    began = time.perf_counter()
    while step < steps:
        result = train_step(parts, step)
        verdict = result.verdict
        if verdict.cause:
            seen |= {plant.step for plant in plants if plant.step <= step <= plant.step + SOON * (plant.kind == "weight")}
        deferred += verdict.deferred
        if os.environ.get("SHOW") and (verdict.text or result.late_verdict):
            print(verdict.text, result.late_verdict and result.late_verdict.text)
        step = step + 1 if verdict.action in (GuardAction.COMMIT, GuardAction.SKIP) else planted.go_back()
    return Outcome(
        parts.guard.memory.left_out_steps(steps), deferred, losses(parts, mixture),
        [f"step {plant.step + 1}: {plant.kind}" for plant in plants if plant.step not in seen], time.perf_counter() - began,
    )  # fmt: skip


def plant(seed: int, steps: int, number: int, first: int) -> list[Plant]:
    """Corruptions of all kinds, spread over the steps from `first` on. Before the model has met both kinds of text, garbled tokens
    and new text are alike."""
    draw = np.random.default_rng([seed, 99])
    places = first + (np.arange(number) + draw.random(number) * 0.5) * (steps - first - 16) / number
    kinds = ["garbled", "largest gradient", "garbled", "weight", "smallest gradient", "garbled", "loss"]
    return [Plant(int(place), kinds[index % len(kinds)]) for index, place in enumerate(places)]


def measure(name: str, seed: int, steps: int, number: int, first: int) -> dict[str, Any]:
    def ran(guard: bool, plants: list[Plant]) -> Outcome:
        (found,) = simulated.run(1, lambda rank: run_one(rank, name, seed, steps, guard, plants), 3600.0, 1)
        return found

    planted = plant(seed, steps, number, first)
    off, on, hit = ran(False, []), ran(True, []), ran(True, planted) if planted else None
    return {
        "mixture": name, "seed": seed, "left_out": on.left_out, "deferred": on.deferred,
        **{f"{part}_off": off.losses[part] for part in off.losses},
        **{f"{part}_on": on.losses[part] for part in on.losses},
        **{f"{part}_ratio": on.losses[part] / off.losses[part] for part in on.losses},
        "planted": len(planted), "missed": hit.missed if hit else [], "left_out_planted": hit.left_out if hit else 0,
        **{f"{part}_planted_ratio": (hit.losses[part] if hit else math.nan) / off.losses[part] for part in off.losses},
        "seconds": off.seconds,
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mixtures", nargs="*", default=list(MIXTURES), choices=[*MIXTURES, *MORE], metavar="NAME")
    parser.add_argument("--seeds", type=int, default=3, help="how many, from --first-seed on")
    parser.add_argument("--first-seed", type=int, default=1)
    parser.add_argument("--first-plant", type=int, default=200, metavar="STEP", help="no corruption before it (default 200)")
    parser.add_argument("--steps", type=int, default=1200)
    parser.add_argument("--plants", type=int, default=7, help="corruptions planted in each run (default 7: with 9 runs, 63)")
    parser.add_argument("--json", type=Path, metavar="FILE")
    given = parser.parse_args()
    torch.set_num_threads(1)
    rows = []
    print(f"{'mixture':<16}{'seed':>5}{'left out':>9}{'deferred':>8}{'easy':>8}{'ratio':>7}{'hard':>8}{'ratio':>7}"
          f"{'planted':>8}{'seen':>5}{'easy':>7}{'hard':>7}{'seconds':>8}")  # fmt: skip
    for name in given.mixtures:
        for seed in range(given.first_seed, given.first_seed + given.seeds):
            row = measure(name, seed, given.steps, given.plants, given.first_plant)
            rows.append(row)
            print(f"{name:<16}{seed:>5}{row['left_out']:>9}{row['deferred']:>8}{row['easy_on']:>8.4f}{row['easy_ratio']:>7.3f}"
                  f"{row['hard_on']:>8.4f}{row['hard_ratio']:>7.3f}{row['planted']:>8}"
                  f"{row['planted'] - len(row['missed']):>5}"
                  f"{row['easy_planted_ratio']:>7.3f}{row['hard_planted_ratio']:>7.3f}"
                  f"{row['seconds']:>8.1f}", flush=True)  # fmt: skip
            for line in row["missed"]:
                print(f"    not seen: {line}")
    if given.json:
        machine = {"cores": len(os.sched_getaffinity(0)), "torch": torch.__version__}
        given.json.write_text(json.dumps({"rows": rows, **machine}, indent=2) + "\n")


if __name__ == "__main__":
    main()

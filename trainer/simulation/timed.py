"""Times each operator of real training steps on this device, so that their costs are known for the sizes of other models.

The operators are described as in a trace (trace.py). Their order, and so what lies in the caches, is that of training.
"""

import time
from collections.abc import Callable

from bagualu.comm.group import Communicator, connect
from bagualu.comm.world import World
from bagualu.parallel.simulation.events import Operator
from bagualu.trainer.assemble import TrainerState, assemble
from bagualu.trainer.data.corpus import prepare
from bagualu.trainer.recipe.config import Recipe
from bagualu.trainer.simulation.operators import EachOperator
from bagualu.trainer.step import train_step

Timed = tuple[Operator, float]
"""An operator and the seconds that a call of it took."""


def alone(recipe: Recipe) -> TrainerState:
    """Returns the state of a run of this rank alone, on a CPU."""
    return assemble(recipe, _communicator(), prepare(recipe.data, recipe.model.vocab))


def _communicator() -> Communicator:
    return connect("gloo", World(0, 1))  # a world of one rank without a meeting place starts no process group


def operator_times(recipe: Recipe, steps: int, meet: Callable[[], None] = lambda: None) -> list[Timed]:
    """Returns the operators of `steps` steps of the recipe, run by this rank alone, with their times. The first step is not timed,
    because it allocates. `meet` is called before each step that is timed."""
    state = alone(recipe)
    train_step(state, 0)
    timed: list[Timed] = []
    timer = EachOperator(lambda operator, seconds: timed.append((operator, seconds)))
    for step in range(1, steps + 1):
        meet()
        with timer:
            train_step(state, step)
    return timed


def step_seconds(recipe: Recipe, steps: int, meet: Callable[[], None] = lambda: None) -> list[float]:
    """Returns the times of `steps` steps of the recipe, run by this rank alone, after a first one. `meet` as in
    `operator_times`."""
    state = alone(recipe)
    train_step(state, 0)
    seconds = []
    for step in range(1, steps + 1):
        meet()
        started = time.perf_counter()
        train_step(state, step)
        seconds.append(time.perf_counter() - started)
    return seconds

"""Times each operator of real training steps on this device, so that their costs are known for the sizes of other models.

The operators are described as in a trace (trace.py). Their order, and so what lies in the caches, is that of training.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch.utils._python_dispatch import TorchDispatchMode

from bagualu.comm.group import Communicator, connect
from bagualu.comm.world import World
from bagualu.parallel.simulation.events import Operator
from bagualu.trainer.assemble import TrainerState, assemble
from bagualu.trainer.data.corpus import prepare
from bagualu.trainer.recipe.config import Recipe
from bagualu.trainer.simulation.operators import Operators, computes, tensors_in
from bagualu.trainer.step import train_step

Timed = tuple[Operator, float]
"""An operator and the seconds that a call of it took."""


class OperatorTimer(TorchDispatchMode):
    """Within this context, times the operators of the thread, on a device that runs them at once, as a CPU does."""

    def __init__(self) -> None:
        super().__init__()
        self.timed: list[Timed] = []
        self._operators = Operators()

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        named = kwargs or {}
        started = time.perf_counter()
        result = func(*args, **named)
        seconds = time.perf_counter() - started
        if computes(func):
            given, made = [*tensors_in(args), *tensors_in(named.values())], list(tensors_in((result,)))
            self.timed.append((self._operators.of(func, args, named, result, given, made), seconds))
        return result

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """Returns that torch need not import its compiler to keep it from compiling this class."""
        return False


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
    timer = OperatorTimer()
    for step in range(1, steps + 1):
        meet()
        with timer:
            train_step(state, step)
    return timer.timed


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

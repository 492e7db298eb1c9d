"""Tells the virtual clock (comm/virtual_clock.py) what a rank computes in its steps, while it trains."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from torch.utils._python_dispatch import TorchDispatchMode

from bagualu.comm.group import Communicator
from bagualu.comm.virtual_clock import ClockedBackend, clocked
from bagualu.parallel.simulation.events import Operator
from bagualu.parallel.simulation.operator_cost import operator_seconds
from bagualu.trainer.simulation.operators import Operators, computes, tensors_in


class StepClock:
    """The virtual time of a rank's steps. `seconds` returns what an operator takes on the rank's chip."""

    def __init__(self, backend: ClockedBackend, seconds: Callable[[Operator], float]) -> None:
        self._backend, self._mode = backend, _OperatorTimes(backend, seconds)
        self.step_seconds = 0.0
        """What the latest step takes on the described cluster."""

    @contextmanager
    def timing(self) -> Iterator[None]:
        """Times a step within this context. Collective."""
        self._backend.begin_step()
        with self._mode:
            yield
        self.step_seconds = self._backend.end_step()


def open_step_clock(communicator: Communicator) -> StepClock | None:
    """Returns the virtual time of this rank's steps; None unless the run was started with a described cluster."""
    backend = clocked(communicator)
    if backend is None:
        return None
    chip = backend.clock.cluster.part_of(communicator.rank).chip
    return StepClock(backend, lambda operator: operator_seconds(chip, operator))


class _OperatorTimes(TorchDispatchMode):
    """Within this context, adds the operators of the thread to the rank's program."""

    def __init__(self, backend: ClockedBackend, seconds: Callable[[Operator], float]) -> None:
        super().__init__()
        self._backend, self._seconds = backend, seconds
        self._operators = Operators()
        self._known: dict[int, float] = {}
        """The seconds of an operator, by its id."""

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        named = kwargs or {}
        result = func(*args, **named)
        if computes(func):
            given, made = [*tensors_in(args), *tensors_in(named.values())], list(tensors_in((result,)))
            operator = self._operators.of(func, args, named, result, given, made)
            if (seconds := self._known.get(id(operator))) is None:
                seconds = self._known[id(operator)] = self._seconds(operator)
            self._backend.computes(seconds)
        return result

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """Returns that torch need not import its compiler to keep it from compiling this class."""
        return False

"""The memory of a run: predicted by kind before it, and the peak measured in it."""

import resource
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from bagualu.comm.agree import maximum
from bagualu.comm.group import Communicator
from bagualu.trainer.assemble import TrainerState
from bagualu.trainer.costs.prediction import fullest, memory_text, predict
from bagualu.trainer.costs.tensor_memory import TensorMemory

_COUNTED_STEPS = 2
"""The steps in which tensors are counted, which adds some 10 µs to each operation. They show the peak: the optimizer's
state exists after the first, and the order in which weights are gathered is known in the second."""


class PeakMemory:
    """Predicts and measures the memory of the ranks of a run."""

    def __init__(self, state: TrainerState, communicator: Communicator) -> None:
        self._state, self._communicator = state, communicator
        self.predicted = fullest(predict(state.recipe, state.mesh.layout, state.split, state.heaviest))
        """The predicted memory of the fullest rank, by kind."""
        on_gpu, threads = state.device.type == "cuda", communicator.one_process and communicator.size > 1
        self._allocator = state.device if on_gpu and not threads else None
        """The device whose allocator counts what this rank takes; None if there is no such device."""
        counts = not on_gpu and not threads and not state.recipe.train.compile
        self._counter = TensorMemory() if counts else None
        """None if the tensors of this rank cannot be counted: those of compiled layers are not seen, and ranks that are threads
        make tensors for each other."""
        self._left = _COUNTED_STEPS

    @contextmanager
    def counting(self) -> Iterator[None]:
        """Counts what a step within this context takes, if it is one of the first steps."""
        if self._counter is None or not self._left:
            yield
            return
        if self._left == _COUNTED_STEPS:
            self._counter.hold(tensor for _, tensor in self._state.engine.held())
        self._left -= 1
        with self._counter:
            yield

    def remark(self) -> str:
        """Returns the line about the prediction that a run prints at its start."""
        return f"memory of the fullest rank, predicted: {memory_text(self.predicted)}"

    def summary(self) -> dict[str, Any]:
        """Returns the value of `memory` in summary.json: bytes predicted by kind, bytes measured (None if they cannot be) and bytes
        of the process, each of the rank with most. Collective."""
        own = self._counter.peak if self._counter else 0
        if self._allocator is not None:
            own = torch.cuda.max_memory_allocated(self._allocator)
        measured, process = (int(maximum(size, self._communicator.world)) for size in (own, process_bytes()))
        return {"predicted": self.predicted, "measured": measured or None, "process": process}


def process_bytes() -> int:
    """Returns the most memory that this process has had, in bytes, with the memory that it shares."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

"""The memory of a run: predicted by kind before it, and the peak measured in it."""

import resource
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch

from bagualu.comm.agree import maxima, total
from bagualu.comm.group import Communicator
from bagualu.trainer.assemble import TrainerState
from bagualu.trainer.costs.prediction import fullest, predict
from bagualu.trainer.costs.tensor_memory import TensorMemory
from bagualu.trainer.show_memory import show_prediction

_COUNTED_STEPS = 2
"""The steps whose peak is measured; counting tensors adds some 10 µs to each of their operations. They show the peak: the
optimizer's state exists after the first, and the order in which weights are gathered is known in the second."""


class PeakMemory:
    """Predicts and measures the memory of the ranks of a run."""

    def __init__(self, state: TrainerState, communicator: Communicator) -> None:
        self._state, self._communicator = state, communicator
        self.predicted = predict(state.recipe, state.mesh.layout, state.split, state.heaviest)
        """The predicted memory of each pipeline rank, by kind."""
        on_gpu, threads = state.device.type == "cuda", communicator.one_process and communicator.size > 1
        self._gpu = state.device if on_gpu else None
        self._allocator = None if threads else self._gpu
        """The device whose allocator counts what this rank takes; None if there is no such device."""
        counts = not on_gpu and not threads
        self._counter = TensorMemory() if counts else None
        """None if the tensors of this rank cannot be counted: ranks that are threads make tensors for each other."""
        self._left = _COUNTED_STEPS
        self._measured = 0
        self._before_steps = 0
        """The most bytes that the allocator had given out before the first counted step, e.g. while weights were read."""

    @contextmanager
    def counting(self) -> Iterator[None]:
        """Measures what a step within this context takes, if it is one of the first steps."""
        if not self._left:
            yield
            return
        if self._left == _COUNTED_STEPS:
            self._start()
        self._left -= 1
        with self._counter or nullcontext():
            yield
        self._measured = self._peak()

    def remark(self) -> str:
        """Returns what a run prints about the prediction at its start."""
        return show_prediction(self.predicted)

    def summary(self) -> dict[str, Any]:
        """Returns the value of `memory` in summary.json: bytes predicted by kind, bytes measured (None if they cannot be) and bytes
        of the process, each of the rank with most; and in `pipeline_ranks` the same for each pipeline rank, of the ranks at that
        coordinate. Collective."""
        count, own = len(self.predicted), self._state.mesh.at("pipeline")
        values = [0] * 2 * count
        values[own], values[count + own] = self._measured, process_bytes()
        most = [int(value) for value in maxima(values, self._communicator.world)]
        measured, process = most[:count], most[count:]
        ranks = [_entry(*values) for values in zip(self.predicted, measured, process, strict=True)]
        return {**_entry(fullest(self.predicted), max(measured), max(process)), "pipeline_ranks": ranks}

    def sum_of_peaks(self) -> int:
        """Returns the peak memory in bytes, summed over ranks: on a CUDA device the memory allocated there, else that of the
        processes. Memory that processes share is then counted once for each of them. Collective."""
        own = process_bytes() if self._gpu is None else max(self._before_steps, torch.cuda.max_memory_allocated(self._gpu))
        if self._communicator.one_process and self._communicator.rank > 0:
            own = 0  # rank 0 reports the memory of the process that they share
        return int(total(own, self._communicator.world))

    def _start(self) -> None:
        if self._counter is not None:
            self._counter.hold(tensor for _, tensor in self._state.engine.held())
        if self._allocator is not None:
            self._before_steps = torch.cuda.max_memory_allocated(self._allocator)
            torch.cuda.reset_peak_memory_stats(self._allocator)

    def _peak(self) -> int:
        if self._allocator is not None:
            return torch.cuda.max_memory_allocated(self._allocator)
        return self._counter.peak if self._counter is not None else 0


def _entry(predicted: dict[str, int], measured: int, process: int) -> dict[str, Any]:
    return {"predicted": predicted, "measured": measured or None, "process": process}


def process_bytes() -> int:
    """Returns the most memory that this process has had, in bytes, with the memory that it shares."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

"""Ranks as threads, each with what it returned or raised, and a small model for them to save."""

from collections.abc import Callable, Iterator
from typing import Any

import torch

from bagualu.comm import simulated
from bagualu.comm.group import Communicator, Group
from bagualu.fault_tolerance.checkpoint.saving.fence import Fence
from bagualu.fault_tolerance.checkpoint.saving.save import Saver
from bagualu.fault_tolerance.checkpoint.saving.snapshot import Snapshot
from bagualu.parallel.boxes import TensorPiece


def run(size: int, function: Callable[[Group], Any]) -> list[Any]:
    """What function(group) returned on each rank, or the exception it raised. Threads are named rank-0, rank-1, ..."""

    def attempt(communicator: Communicator) -> Any:
        try:
            return function(communicator.world)
        except Exception as error:
            return error

    return simulated.run(size, attempt, timeout_seconds=60)


def tensors(step: int) -> dict[str, torch.Tensor]:
    """A small model whose every element tells the step."""
    return {
        "weight/a": torch.arange(24.0).view(6, 4) + 1000 * step,
        "moment/a": torch.full((6, 4), float(step), dtype=torch.float64),
        "count": torch.tensor(step),
        "half/b": torch.full((5,), float(step), dtype=torch.bfloat16),
    }


def rows_of(step: int, group: Group) -> Iterator[TensorPiece]:
    """This rank's share of it: some rows of each; scalars on the last rank."""
    for name, tensor in tensors(step).items():
        if not tensor.dim():
            if group.rank == group.size - 1:
                yield TensorPiece(name, (), (), tensor)
            continue
        rows = len(tensor)
        begin, end = rows * group.rank // group.size, rows * (group.rank + 1) // group.size
        yield TensorPiece(name, tuple(tensor.shape), (begin, *(0,) * (tensor.dim() - 1)), tensor[begin:end])


def save_fenced(fence: Fence, step: int, size: int = 1, keep: int = 2) -> list[Any]:
    """Save as a run does that has taken the fence; what each rank returned or raised."""

    def one(group: Group) -> Any:
        saver = Saver(fence, group, keep)
        try:
            saver.start(step, rows_of(step, group), {"step": step})
            return saver.conclude()
        finally:
            saver.close()

    return run(size, one)


def save_while_training(saver: Saver, step: int, snapshot: Snapshot) -> tuple[Any, int]:
    """Save in the background, as the steps of a run see it; the path or the error, and how many steps it took."""
    mine = list(rows_of(step, saver.group))
    saver.start(step, snapshot.take(mine), {"step": step})
    for piece in mine:
        piece.tensor.fill_(0)  # training goes on
    return steps_until_known(saver)


def steps_until_known(saver: Saver) -> tuple[Any, int]:
    """Steps of training until the save under way is known to be saved, or not; what it led to, and how many steps."""
    for count in range(1, 1_000_000):
        told = torch.tensor(saver.status())
        saver.group.all_reduce(told)
        writing, failed = told.tolist()
        if failed or not writing:
            try:
                if path := saver.advance(wait=not failed):
                    return path, count
            except Exception as error:
                return error, count
    raise AssertionError("never known")

"""Ranks as threads, with the three collectives a checkpoint needs."""

import threading
from collections.abc import Callable
from typing import Any

import torch

from bagualu.comm.group import Done, Group


class World:
    def __init__(self, size: int) -> None:
        self.barrier = threading.Barrier(size, timeout=60)
        self.slots: list[Any] = [None] * size


class Threads:
    """A transport: everybody puts its tensor into a slot, waits, and takes what it needs."""

    def __init__(self, world: World, rank: int) -> None:
        self.world, self.rank = world, rank

    def all_gather(self, output: torch.Tensor, input: torch.Tensor) -> Done:
        output.copy_(torch.cat(self._exchange(input)))
        return Done()

    def broadcast(self, tensor: torch.Tensor, source: int) -> Done:
        tensor.copy_(self._exchange(tensor)[source])
        return Done()

    def barrier(self) -> Done:
        self._exchange(None)
        return Done()

    def _exchange(self, value: Any) -> list[Any]:
        self.world.slots[self.rank] = None if value is None else value.clone()
        self.world.barrier.wait()
        values = list(self.world.slots)
        self.world.barrier.wait()
        return values


def run(size: int, function: Callable[[Group], Any]) -> list[Any]:
    """What function(group) returned on each rank, or the exception it raised. Threads are named rank-0, rank-1, ..."""
    world, results = World(size), [None] * size

    def work(rank: int) -> None:
        try:
            transport = Threads(world, rank) if size > 1 else None
            results[rank] = function(Group("world", tuple(range(size)), rank, transport))
        except Exception as error:
            results[rank] = error

    threads = [threading.Thread(target=work, args=(rank,), name=f"rank-{rank}") for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results

"""The virtual clock of ranks that are threads of one process: real data moves between them, and their steps take the time that they
would take on a described cluster.

Each rank writes down what it does in a step. At the end of the step, when all ranks have done so, their programs are run by the
rules of clock.py. So the time does not depend on how fast this machine is, nor on the order in which it runs the threads.
"""

import threading
from collections.abc import Sequence

import torch

from bagualu.comm.backend import Backend
from bagualu.comm.calls import Communication, Waited
from bagualu.comm.clock import MESSAGES, Begin, Clock, Compute, Item, Lane, Prices, Wait
from bagualu.comm.group import Communicator
from bagualu.comm.recording import RecordingBackend, RecordingTransport
from bagualu.comm.topology import Cluster, as_range
from bagualu.comm.world import World


class VirtualClock:
    """The clock that all ranks of a world share."""

    def __init__(self, size: int, cluster: Cluster) -> None:
        """Raises RecipeError if the cluster does not have `size` devices."""
        self.size, self.cluster = size, cluster.for_world(size)
        self._prices = Prices(self.cluster)
        self._lanes: dict[tuple[str, tuple[int, ...]], Lane] = {}
        self._programs: dict[int, dict[int, list[Item]]] = {}
        """By step and rank, the programs of steps that have not been run."""
        self._latest: tuple[int, Clock] | None = None
        """The number of the step that was run last, and its clock."""
        self._lock = threading.Lock()

    def lane(self, group: str, members: tuple[int, ...], message: bool) -> Lane:
        """Returns the lane of the collectives of a group, or of its messages from the first to the second of `members`."""
        name = f"{group} {members[0]} -> {members[1]}" if message else group
        with self._lock:
            if (name, members) not in self._lanes:
                self._lanes[name, members] = Lane(group, name, members, as_range(members))
            return self._lanes[name, members]

    def add(self, step: int, rank: int, program: list[Item]) -> None:
        """Adds what a rank does in a step."""
        with self._lock:
            self._programs.setdefault(step, {})[rank] = program

    def run(self, step: int) -> Clock:
        """Returns the clock after a step, whose programs all ranks have added. Raises CommunicationError if these do not fit
        together."""
        with self._lock:
            if self._latest is None or self._latest[0] != step:
                clock = Clock(sorted(self._programs.pop(step).items()), self._prices)
                clock.run()
                self._latest = step, clock
            return self._latest[1]


class ClockedBackend(RecordingBackend):
    """A rank's connection through `inner`, which writes the rank's program for the virtual clock."""

    def __init__(self, world: World, timeout_seconds: float, inner: Backend, clock: VirtualClock) -> None:
        super().__init__(world, timeout_seconds, inner, self._write_down)
        self.clock = clock
        self._step, self._items = 0, list[Item]()
        self._ranks: dict[str, Sequence[int]] = {}
        self._lanes: dict[tuple[str, bool, int | None], Lane] = {}
        self._all = inner.transport(range(world.size), "clock")

    def transport(self, ranks: Sequence[int], name: str) -> RecordingTransport:
        self._ranks[name] = ranks
        return super().transport(ranks, name)

    def begin_step(self) -> None:
        """Begins a step. What the rank has done before it, e.g. to save a checkpoint, does not count."""
        self._items = []

    def computes(self, seconds: float) -> None:
        """Adds an operator that takes so long."""
        if self._items and isinstance(last := self._items[-1], Compute):
            self._items[-1] = Compute(last.seconds + seconds)
        else:
            self._items.append(Compute(seconds))

    def end_step(self) -> float:
        """Ends the step and returns the seconds that it takes on the cluster, the same on all ranks. Collective."""
        self._step += 1
        self.clock.add(self._step, self.world.rank, self._items)
        self._items = []
        self._all.barrier().wait()
        return self.clock.run(self._step).end

    def _write_down(self, event: Communication | Waited, tensors: Sequence[torch.Tensor]) -> None:
        if event.kind == "lend":
            return
        lane = self._lane(event.group, event.kind, event.peer)
        if isinstance(event, Waited):
            self._items.append(Wait(lane, event.kind, event.index))
        else:
            self._items.append(Begin(lane, event.kind, event.bytes))

    def _lane(self, group: str, kind: str, peer: int | None) -> Lane:
        message = kind in MESSAGES
        key = group, kind == MESSAGES[0], peer if message else None
        if key not in self._lanes:
            ranks, own = self._ranks[group], self.world.rank
            members = tuple(ranks)
            if message:
                other = ranks[peer or 0]
                members = (own, other) if kind == MESSAGES[0] else (other, own)
            self._lanes[key] = self.clock.lane(group, members, message)
        return self._lanes[key]


def clocked(communicator: Communicator) -> ClockedBackend | None:
    """Returns the rank's part of the virtual clock; None if there is none."""
    backend = communicator.backend
    return backend if isinstance(backend, ClockedBackend) else None

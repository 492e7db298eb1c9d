"""Runs all ranks as threads of one process, with real tensors, on the CPU or on a single GPU: one debugger sees all ranks.

Reductions run in rank order, so results are reproducible to the bit. Because one object sees every rank, two mistakes that would
hang a cluster raise errors here: ranks that call different collectives, and ranks that wait for each other. The error names the
ranks and the call that each of them waits for.
"""

import contextlib
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch.utils._python_dispatch import _disable_current_modes

from bagualu.comm.backend import Backend, ReduceOp
from bagualu.comm.errors import CommunicationError, RecipeError
from bagualu.comm.group import Communicator
from bagualu.comm.virtual_clock import ClockedBackend, VirtualClock
from bagualu.comm.world import World

T = TypeVar("T")
_LOOK_SECONDS = 0.05
"""How often `hung` is called, however many ranks there are."""
_GRACE_SECONDS = 1.0
"""Time that all ranks together get to end after `hung` has given a reason; threads that still run afterwards are abandoned."""
Tensors = dict[str, torch.Tensor]


@dataclass
class Call:
    """A communication in progress: the ranks that have joined it, their tensors, and a function that performs it."""

    what: str
    signature: tuple[Any, ...]
    ranks: Sequence[int]
    carry_out: Callable[[list[Tensors]], None]
    arrived: dict[int, Tensors] = field(default_factory=dict)
    done: bool = False
    changed: threading.Condition | None = None
    """Wakes the ranks that wait for this call, and no others; None if none has waited for it."""

    def missing(self) -> list[int]:
        return [rank for rank in self.ranks if rank not in self.arrived]


class Hub:
    """The object through which the threads, one per rank, communicate."""

    def __init__(self, size: int, timeout_seconds: float, device: torch.device) -> None:
        self.timeout_seconds = timeout_seconds
        self.device = device
        self._lock = threading.Lock()
        self._calls: dict[tuple[Any, ...], Call] = {}
        self._waiting: dict[int, Call] = {}
        self._running = set(range(size))
        self._failure: str | None = None
        self.first_error: BaseException | None = None

    @property
    def failed(self) -> bool:
        """Whether a communication has failed. Every later communication then fails too."""
        return self._failure is not None

    def join(self, key: tuple[Any, ...], rank: int, call: Call, tensors: Tensors) -> Call:
        """Adds this rank's tensors to the call under `key` and returns that call. The last rank to join performs it. Raises
        CommunicationError if a communication has failed before or another rank's call under `key` differs."""
        with self._lock:
            self._raise_failure()
            first = self._calls.setdefault(key, call)
            if first.signature != call.signature:
                own = f"rank {rank} calls {call.what} {call.signature}"
                self._fail(f"{own}, but rank {next(iter(first.arrived))} calls {first.what} {first.signature}")
            first.arrived[rank] = tensors
            last = not first.missing()
            if last:
                del self._calls[key]
        if last:
            # What the last rank does here for all ranks is no computation of its own, which a dispatch mode might count.
            with torch.no_grad(), _disable_current_modes():
                first.carry_out([first.arrived[member] for member in first.ranks])
            with self._lock:
                first.done = True
                if first.changed is not None:
                    first.changed.notify_all()
        return first

    def wait(self, rank: int, call: Call) -> None:
        """Waits until all ranks of `call` have joined it and it is done. Raises CommunicationError on a deadlock, a timeout or
        another rank's failure."""
        with self._lock:
            self._waiting[rank] = call
            call.changed = call.changed or threading.Condition(self._lock)
            try:
                self._find_deadlock()
                if not call.changed.wait_for(lambda: call.done or self._failure, self.timeout_seconds):
                    self._fail(f"{call.what} has waited {self.timeout_seconds} s for ranks {call.missing()}")
                if not call.done:
                    self._raise_failure()
            finally:
                del self._waiting[rank]

    def leave(self, rank: int, error: BaseException | None) -> None:
        """Records that the thread of `rank` has ended. Waiting ranks fail if the thread ended with `error` or if they are now
        deadlocked; `error` None: it ended normally."""
        with self._lock:
            self._running.discard(rank)
            if error is not None and self._failure is None:
                self._failure, self.first_error = f"rank {rank} failed: {type(error).__name__}: {error}", error
            with contextlib.suppress(CommunicationError):  # the waiting ranks raise the recorded failure
                self._find_deadlock()
            if self._failure is not None:
                self._wake_all()

    def give_up(self, why: str) -> None:
        """Makes every communication fail with the message `why`: those that ranks wait for now and all later ones. If a
        communication has failed before, its message stays."""
        with self._lock:
            self._failure = self._failure or why
            self._wake_all()

    def _wake_all(self) -> None:
        for call in self._waiting.values():
            if call.changed is not None:
                call.changed.notify_all()

    def _find_deadlock(self) -> None:
        if len(self._waiting) < len(self._running):
            return
        stuck = all(rank in self._waiting and self._waiting[rank].missing() for rank in self._running)
        if stuck and self._running and self._failure is None:
            lines = [f"rank {rank} waits in {call.what} for ranks {call.missing()}" for rank, call in self._waiting.items()]
            self._fail("deadlock, every running rank waits for another: " + "; ".join(sorted(lines)))

    def _fail(self, message: str) -> None:
        self._failure, self.first_error = message, CommunicationError(message)
        self._wake_all()
        raise self.first_error

    def _raise_failure(self) -> None:
        if self._failure is not None:
            raise CommunicationError(self._failure)


@dataclass(frozen=True)
class SimulatedWork:
    hub: Hub
    rank: int
    call: Call

    def wait(self) -> None:
        if not self.call.done:
            self.hub.wait(self.rank, self.call)


class SimulatedTransport:
    """The collectives of a group of threads. The n-th call of each rank in the group belongs together, as does the n-th message
    between two ranks."""

    def __init__(self, hub: Hub, key: tuple[Any, ...], ranks: Sequence[int], rank: int) -> None:
        self.hub = hub
        self.key = key
        self.ranks = ranks
        self.rank = rank
        self._sequence: dict[Any, int] = {}

    def _join(
        self, op: str, detail: tuple[Any, ...], carry_out: Callable[[list[Tensors]], None], pair: tuple[int, int] | None = None,
        **tensors: torch.Tensor,
    ) -> SimulatedWork:  # fmt: skip
        count = self._sequence[pair] = self._sequence.get(pair, 0) + 1
        ranks = self.ranks if pair is None else pair
        where = f"group {self.key[0]}" if pair is None else f"{pair[0]} -> {pair[1]} of group {self.key[0]}"
        call = Call(f"{op} number {count} in {where}", (op.split()[-1], *detail), ranks, carry_out)
        return SimulatedWork(self.hub, self.rank, self.hub.join((*self.key, pair, count), self.rank, call, tensors))

    def all_reduce(self, tensor: torch.Tensor, op: ReduceOp, asynchronous: bool) -> SimulatedWork:
        def carry_out(members: list[Tensors]) -> None:
            total = _wide(members[0]["tensor"])
            for member in members[1:]:
                total = total + member["tensor"] if op == "sum" else torch.maximum(total, _wide(member["tensor"]))
            for member in members:
                member["tensor"].copy_(total)

        return self._join("all_reduce", (op, tensor.numel(), tensor.dtype, _mode(asynchronous)), carry_out, tensor=tensor)

    def all_gather(self, output: torch.Tensor, input: torch.Tensor, asynchronous: bool) -> SimulatedWork:
        def carry_out(members: list[Tensors]) -> None:
            whole = torch.cat([member["input"].reshape(-1) for member in members])
            for member in members:
                member["output"].view(-1).copy_(whole)

        return self._join("all_gather", (input.numel(), input.dtype, _mode(asynchronous)), carry_out, output=output, input=input)

    def reduce_scatter(self, output: torch.Tensor, input: torch.Tensor, asynchronous: bool) -> SimulatedWork:
        def carry_out(members: list[Tensors]) -> None:
            total = _wide(members[0]["input"].reshape(-1))
            for member in members[1:]:
                total += member["input"].reshape(-1)
            for member, part in zip(members, total.chunk(len(members)), strict=True):
                member["output"].view(-1).copy_(part)

        return self._join(
            "reduce_scatter", (output.numel(), output.dtype, _mode(asynchronous)), carry_out, output=output, input=input
        )

    def all_to_all(
        self, output: torch.Tensor, input: torch.Tensor, output_splits: list[int], input_splits: list[int], asynchronous: bool
    ) -> SimulatedWork:
        splits = torch.tensor([input_splits, output_splits])

        def carry_out(members: list[Tensors]) -> None:
            for position, receiver in enumerate(members):
                parts = []
                for source, sender in enumerate(members):
                    sent, expected = int(sender["splits"][0, position]), int(receiver["splits"][1, source])
                    if sent != expected:
                        raise CommunicationError(
                            f"all_to_all in group {self.key[0]}: rank {self.ranks[source]} sends {sent} rows to rank "
                            f"{self.ranks[position]}, which expects {expected}"
                        )
                    parts.append(sender["input"].split(sender["splits"][0].tolist())[position])
                receiver["output"].copy_(torch.cat(parts))

        shape = input.shape[1:], input.dtype, _mode(asynchronous)
        return self._join("all_to_all", shape, carry_out, output=output, input=input, splits=splits)

    def broadcast(self, tensor: torch.Tensor, source: int) -> SimulatedWork:
        def carry_out(members: list[Tensors]) -> None:
            for member in members:
                if member is not members[source]:
                    member["tensor"].copy_(members[source]["tensor"])

        return self._join("broadcast", (source, tensor.numel(), tensor.dtype), carry_out, tensor=tensor)

    def send(self, tensor: torch.Tensor, destination: int) -> SimulatedWork:
        return self._message("send", tensor, (self.rank, self.ranks[destination]))

    def receive(self, tensor: torch.Tensor, source: int) -> SimulatedWork:
        return self._message("receive", tensor, (self.ranks[source], self.rank))

    def _message(self, op: str, tensor: torch.Tensor, pair: tuple[int, int]) -> SimulatedWork:
        def carry_out(members: list[Tensors]) -> None:
            sender, receiver = members
            receiver["tensor"].copy_(sender["tensor"])

        return self._join(f"{op} message", (tensor.numel(), tensor.dtype), carry_out, pair, tensor=tensor)

    def barrier(self) -> SimulatedWork:
        return self._join("barrier", (), lambda members: None)

    def lend(self, numel: int, dtype: torch.dtype) -> torch.Tensor | None:
        self._join("lend", (numel, dtype), lambda members: None).wait()
        return None


def _mode(asynchronous: bool) -> str:
    return "asynchronous" if asynchronous else "synchronous"


def _wide(tensor: torch.Tensor) -> torch.Tensor:
    """Returns a copy in at least float32, so that a sum is rounded once and not after every addend."""
    dtype = torch.float32 if tensor.dtype in (torch.bfloat16, torch.float16) else tensor.dtype
    return tensor.to(dtype, copy=True)


class SimulatedBackend:
    """One thread's connection to the hub."""

    def __init__(self, world: World, timeout_seconds: float) -> None:
        if world.size > 1 and not isinstance(world.hub, Hub):
            raise RecipeError(
                "comm.backend=simulated runs every rank in one process; start it with `bagualu train`, "
                "or give comm.backend=gloo for torchrun"
            )
        self.world = world
        self.device = world.hub.device if world.hub else torch.device("cpu")
        self._made: dict[Sequence[int], int] = {}

    def transport(self, ranks: Sequence[int], name: str) -> SimulatedTransport:
        count = self._made[ranks] = self._made.get(ranks, 0) + 1
        return SimulatedTransport(self.world.hub, (name, ranks, count), ranks, self.world.rank)

    def close(self) -> None:
        return None


def run(
    size: int,
    function: Callable[[Communicator], T],
    timeout_seconds: float = 600.0,
    threads: int = 1,
    hung: Callable[[], str | None] = lambda: None,
    device: str = "cpu",
    clock: VirtualClock | None = None,
) -> list[T]:
    """Runs `function(communicator)` on `size` ranks, each a thread with `threads` compute threads, and returns results by rank.

    If ranks fail, raises the first error that is not a CommunicationError, or else the first error, with a note that names its
    rank. All ranks share `device`. On a GPU they also share its stream, so kernels run in the order in which the ranks launch them.

    `hung` is called repeatedly. It returns None, or the reason why the ranks make no progress. If it returns a reason, the ranks
    that wait fail, those that go on running are abandoned (a thread cannot be killed), and this raises CommunicationError.
    `clock`: the clock that is told what the ranks do.
    """
    if device == "cuda" and not torch.cuda.device_count():
        raise RecipeError("comm.device=cuda needs a GPU, but this torch sees none; give comm.device=cpu")
    hub = Hub(size, timeout_seconds, torch.device(device))
    results: dict[int, T] = {}
    errors: deque[tuple[int, BaseException]] = deque()

    def rank_main(rank: int) -> None:
        error: BaseException | None = None
        torch.set_num_threads(threads)
        # torch runs the backward passes of all threads on one thread per GPU, where a rank that waits would block the others. This
        # keeps a rank's backward pass on its own thread.
        torch.autograd.set_multithreading_enabled(False)
        try:
            world = World(rank, size, rank, hub=hub)
            backend: Backend = SimulatedBackend(world, timeout_seconds)
            if clock is not None:
                backend = ClockedBackend(world, timeout_seconds, backend, clock)
            results[rank] = function(Communicator(backend, world))
        except BaseException as caught:
            error = caught
            errors.append((rank, caught))
        hub.leave(rank, error)

    workers = [threading.Thread(target=rank_main, args=(rank,), name=f"rank-{rank}", daemon=True) for rank in range(size)]
    for worker in workers:
        worker.start()
    _join(workers, hub, hung)
    if errors:
        rank, error = min(errors, key=lambda item: (isinstance(item[1], CommunicationError), item[1] is not hub.first_error))
        error.add_note(f"on simulated rank {rank} of {size}")
        raise error
    return [results[rank] for rank in range(size)]


def _join(workers: list[threading.Thread], hub: Hub, hung: Callable[[], str | None]) -> None:
    """Waits for the threads to end. Raises CommunicationError if `hung` returns a reason why the ranks make no progress."""
    while alive := [worker for worker in workers if worker.is_alive()]:
        alive[0].join(_LOOK_SECONDS)
        if why := hung():
            hub.give_up(why)
            deadline = time.monotonic() + _GRACE_SECONDS
            for worker in workers:
                worker.join(max(0.0, deadline - time.monotonic()))
            raise CommunicationError(why)

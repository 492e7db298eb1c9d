"""Runs a function on N ranks: warm Gloo processes that are started once per test session, or threads.

`run("gloo", 4, function, *args)` and `run("simulated", ...)` return the results by rank. For Gloo, function and arguments
must be picklable. The pool imports torch once (forkserver with preload), so a run costs milliseconds, not seconds.
"""

import atexit
import functools
import gc
import multiprocessing
import multiprocessing.connection
import multiprocessing.util
import os
import tempfile
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from bagualu.comm import simulated
from bagualu.comm.group import Communicator, connect
from bagualu.comm.world import World
from bagualu.trainer import run as whole_run
from bagualu.trainer.process.garbage_collection import leave_out_what_is_there

BACKENDS = ("gloo", "simulated")
ON_GPU = pytest.param("simulated-cuda", marks=pytest.mark.gpu)
"""The ranks as threads that share one GPU, for `run`."""
TIMEOUT_SECONDS = 120.0
OBJECTS = 50_000
"""So many more objects than before start a garbage collection. By default 700 do, which ranks that are threads soon have: the
collections then take a tenth of all processor time."""


def run(backend: str, size: int, function: Callable[..., Any], *args: Any) -> list[Any]:
    """Call function(communicator, *args) on `size` ranks of `backend`; the first root-cause error is raised here."""
    if backend in ("simulated", "simulated-cuda"):
        device = "cuda" if backend == "simulated-cuda" else "cpu"
        try:
            with _on_one_core():
                return simulated.run(size, lambda communicator: function(communicator, *args), TIMEOUT_SECONDS, device=device)
        finally:
            if torch.are_deterministic_algorithms_enabled():  # a run on a GPU turns that on for its process
                torch.use_deterministic_algorithms(False)
    return _pool().run(backend, size, function, args)


@contextmanager
def _on_one_core() -> Iterator[None]:
    """Threads with tiny tensors on several cores fight for the interpreter lock at every operation: it takes twice the time."""
    cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
    if cores:
        lane = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0")[2:])
        os.sched_setaffinity(0, {cores[lane % len(cores)]})  # of this thread and those that it starts
    try:
        yield
    finally:
        if cores:
            os.sched_setaffinity(0, cores)


class WorkerFailed(AssertionError):
    """A rank of a warm worker raised; holds its traceback."""


class _Pool:
    def __init__(self) -> None:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["bagualu.trainer.run", "bagualu.trainer.process.worker"])
        self.context = context
        self.pipes: list[multiprocessing.connection.Connection] = []
        self.processes: list[Any] = []
        self.runs = 0
        self.folder = tempfile.TemporaryDirectory(prefix="bagualu-tests-")

    def grow(self, size: int) -> None:
        while len(self.pipes) < size:
            here, there = self.context.Pipe()
            process = self.context.Process(target=_serve, args=(there,), daemon=True)
            process.start()
            there.close()
            self.pipes.append(here)
            self.processes.append(process)

    def run(self, backend: str, size: int, function: Callable[..., Any], args: tuple[Any, ...]) -> list[Any]:
        self.grow(size)
        self.runs += 1
        meeting = (Path(self.folder.name) / f"run-{self.runs}").as_uri()
        for rank, pipe in enumerate(self.pipes[:size]):
            pipe.send((backend, World(rank, size, rank, meeting), function, args))
        answers = self._collect(size)
        failures = {rank: answer for rank, answer in answers.items() if not answer[0]}
        if failures:
            self.stop()  # a failed rank may have left messages under way; the next run starts fresh
            rank = min(failures, key=lambda r: failures[r][2] == "CommunicationError")
            others = "; ".join(f"rank {r}: {a[1].strip().splitlines()[-1]}" for r, a in failures.items() if r != rank)
            raise WorkerFailed(f"rank {rank} of {size}:\n{failures[rank][1]}\nthen {others}")
        return [answers[rank][1] for rank in range(size)]

    def _collect(self, size: int) -> dict[int, tuple[bool, Any, str]]:
        """The answers by rank. A rank that fails is killed, as it would have died, so that its peers learn of it."""
        answers: dict[int, tuple[bool, Any, str]] = {}
        while len(answers) < size:
            waiting = {pipe: rank for rank, pipe in enumerate(self.pipes[:size]) if rank not in answers}
            ready = multiprocessing.connection.wait(list(waiting), timeout=TIMEOUT_SECONDS + 60)
            if not ready:
                self.stop()
                raise WorkerFailed(f"ranks {sorted(waiting.values())} of {size} gave no answer")
            for pipe in ready:
                rank = waiting[pipe]  # type: ignore[index]
                try:
                    answers[rank] = self.pipes[rank].recv()
                except EOFError:
                    answers[rank] = (False, "the process died", "died")
                if not answers[rank][0]:
                    self.processes[rank].kill()
        return answers

    def stop(self) -> None:
        for process in self.processes:
            process.kill()
            process.join()
        self.pipes, self.processes = [], []


def prepare() -> None:
    """Make the pool's temporary folders now, so that a test that looks for left files does not find them."""
    multiprocessing.util.get_temp_dir()
    _pool()


def known_ceiling(*_: object) -> float:
    """Takes the place of `matmul_ceiling` in all runs of the tests but those that a launcher starts."""
    return 1e9


def _serve(pipe: multiprocessing.connection.Connection) -> None:
    torch.set_num_threads(1)
    leave_out_what_is_there()  # as a worker of the launcher does
    gc.set_threshold(OBJECTS)
    whole_run.matmul_ceiling = known_ceiling
    while True:
        try:
            backend, world, function, args = pipe.recv()
        except EOFError:
            return
        try:
            communicator: Communicator = connect(backend, world, TIMEOUT_SECONDS)
            try:
                answer = (True, function(communicator, *args), "")
            finally:
                communicator.close()
        except BaseException as error:
            answer = (False, traceback.format_exc(), type(error).__name__)
        pipe.send(answer)


@functools.cache
def _pool() -> _Pool:
    pool = _Pool()
    atexit.register(pool.stop)
    return pool

"""A rank that dies while replicas are made: the old one or the new one, whole; never a mixture, never nothing."""

import os
import shutil
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

from bagualu.comm.errors import CommunicationError
from bagualu.comm.group import Communicator
from tests.fault_tolerance.replica.cluster import keep, open_replicas, pieces, resume
from tests.harness import run

CALLS = ("open", "write", "pwrite", "preadv", "fsync", "close", "rename", "mkdir", "unlink", "rmdir", "scandir")


class Dead(BaseException):
    """What a killed rank's thread ends with."""


@contextmanager
def dying(victim: int, at: int) -> Iterator[list[int]]:
    """From its call number `at` on, every call of the victim that could change a file raises Dead. Yields their count."""
    count = [0]
    originals = {name: getattr(os, name) for name in CALLS}

    def wrap(name: str) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            if threading.current_thread().name == f"rank-{victim}":
                if count[0] >= at:
                    if name in ("write", "pwrite") and count[0] == at:
                        originals[name](args[0], args[1][: len(args[1]) // 2], *args[2:])
                    count[0] += 1
                    raise Dead
                count[0] += 1
            return originals[name](*args, **kwargs)

        return call

    for name in CALLS:
        setattr(os, name, wrap(name))
    try:
        yield count
    finally:
        for name, original in originals.items():
            setattr(os, name, original)


def third(communicator: Communicator, folder: Path, per_node: int) -> None:
    """Go on from step 20 and keep step 30: the third generation, for which the first has to go."""
    replicas = open_replicas(communicator, folder, per_node)
    replicas.start(replicas.candidates()[0].step)
    replicas.keep(30, pieces(30, communicator.rank, communicator.size), {"step": 30})


@pytest.mark.parametrize(("size", "per_node", "victim"), [(4, 2, 0), (4, 2, 3), (3, 1, 0)])
def test_killed_at_every_call(tmp_path: Path, size: int, per_node: int, victim: int) -> None:
    """One rank dies at each of its calls in turn; afterwards a node may be gone too, its own or another."""
    run("simulated", size, keep, tmp_path / "before", per_node, 10, 20)
    steps, at, finished = set(), 0, False
    while not finished:
        folder = tmp_path / f"killed-{at}"
        shutil.copytree(tmp_path / "before", folder)
        with dying(victim, at) as count, suppress(Dead, CommunicationError):
            run("simulated", size, third, folder, per_node)
        finished = count[0] <= at
        lost = (None, 0, 1)[at % 3]
        if lost is not None:
            shutil.rmtree(folder / f"node-{lost}")
        (answer,) = set(map(repr, run("simulated", size, resume, folder, per_node)))
        assert answer in (("(30, [])",) if finished else ("(20, [])", "(30, [])")), (at, lost)
        assert not list(folder.glob("node-*/replicas/.[rs]*ing-*"))  # nothing that the dead could still commit
        steps.add(answer)
        shutil.rmtree(folder)
        at += 1
    assert len(steps) == 2
    assert at > 20  # the enumeration did reach the calls

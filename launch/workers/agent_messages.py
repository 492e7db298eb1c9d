"""What the agents of a run's nodes tell each other, beside elastic's rendezvous. All of it is signed."""

import contextlib
import json
import time
from collections.abc import Callable
from typing import Any

from bagualu.comm.store import Store
from bagualu.launch.workers.secret import Seal

_ENDING, _LEFT, _BACKEND = "ending", "left", "backend"
_REGROUP, _TRAINED = "bagualu/regroup", "bagualu/trained"
LEAVE_SECONDS = 10.0
"""For the others to say how the run has ended, or to read it and to leave."""


class Board:
    """A part of the agents' store, in which only what an agent of the run has signed counts."""

    def __init__(self, store: Store, seal: Seal, part: str) -> None:
        """`part` names `store` among the parts of the agents' store: what was signed for one part is not taken in another."""
        self.store = store
        self._seal, self._part = seal, part

    def write(self, key: str, text: str = "") -> None:
        self.store.set(key, self._signed(key, text))

    def write_first(self, key: str, text: str) -> str:
        """Write unless an agent has written; what stands there then."""
        expected = b""
        while True:
            found = self.store.compare_set(key, expected, self._signed(key, text))  # type: ignore[arg-type]  # bytes too
            if (written := self._seal.opened(self._name(key), found)) is not None:
                return written
            expected = found if found != expected else b""  # replaced, or gone again

    def read(self, key: str) -> str | None:
        """What an agent has written; None: nothing so far."""
        return self._seal.opened(self._name(key), self.store.get(key)) if self.store.check([key]) else None

    def _signed(self, key: str, text: str) -> str:
        return self._seal.sign(self._name(key), text)

    def _name(self, key: str) -> str:
        return f"{self._part}/{key}"


class Ending:
    """How the run has ended, for all nodes; the first that knows says it. Nothing is heard when the store's host is gone."""

    def __init__(self, board: Board) -> None:
        """`board`: the one that all rounds of the rendezvous share."""
        self._board = board

    def say(self, document: dict[str, Any]) -> None:
        with contextlib.suppress(RuntimeError):
            self._board.write_first(_ENDING, json.dumps(document))

    def heard(self, patience_seconds: float = 0.0) -> dict[str, Any] | None:
        """What a node has said, or says within so many seconds."""
        deadline = time.monotonic() + patience_seconds
        with contextlib.suppress(RuntimeError):
            while (said := self._board.read(_ENDING)) is None and time.monotonic() < deadline:
                time.sleep(0.05)
            if said is not None:
                document: dict[str, Any] = json.loads(said)
                return document
        return None

    def leave(self) -> None:
        """Say that this agent asks nothing of the store any more. A bare count: a false one lets the host leave sooner, no more."""
        with contextlib.suppress(RuntimeError):
            self._board.store.add(_LEFT, 1)

    def await_leaving(self, nodes: int, patience_seconds: float, stop: Callable[[], bool] = lambda: False) -> None:
        """On the store's host, which leaves last: wait until so many nodes have left, but not longer than `patience_seconds`."""
        deadline = time.monotonic() + patience_seconds
        with contextlib.suppress(RuntimeError):
            while self._board.store.add(_LEFT, 0) < nodes and time.monotonic() < deadline and not stop():
                time.sleep(0.05)


def backend_of_all(board: Board, own: str) -> str:
    """The backend of the node that was first to say its own; all nodes of a run must have the same."""
    return board.write_first(_BACKEND, own)


def ask_to_regroup(board: Board) -> None:
    """Tell the agents of this round that its workers stop only to let a node in."""
    board.write(_REGROUP)


def regrouping(board: Board) -> bool:
    """Whether an agent of this round has said so."""
    return board.read(_REGROUP) is not None


def say_trained(board: Board, summary: dict[str, Any]) -> None:
    """Tell the agents of this round that the ranks that train are through."""
    board.write(_TRAINED, json.dumps(summary))


def trained(board: Board) -> dict[str, Any] | None:
    """The summary, if an agent of this round has said so."""
    written = board.read(_TRAINED)
    summary: dict[str, Any] | None = None if written is None else json.loads(written)
    return summary

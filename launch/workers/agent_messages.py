"""Signed messages between the agents of a run's nodes, in addition to those of torch elastic's rendezvous."""

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
"""How long to wait for the other agents to publish how the run ended, or to read it and leave."""


class Board:
    """Signed values under keys in the agents' store. A value that no agent of the run has signed is ignored."""

    def __init__(self, store: Store, seal: Seal, part: str) -> None:
        """`part` is the name of `store`'s section of the agents' store; a value signed for one section is not valid in another."""
        self.store = store
        self._seal, self._part = seal, part

    def write(self, key: str, text: str = "") -> None:
        """Sign `text` and store it under `key`."""
        self.store.set(key, self._signed(key, text))

    def write_first(self, key: str, text: str) -> str:
        """Write `text` unless an agent has already written under `key`. Returns the text that is stored there afterwards."""
        expected = b""
        while True:
            stored = self.store.compare_set(key, expected, self._signed(key, text))  # type: ignore[arg-type]  # takes bytes too
            if (written := self._seal.opened(self._name(key), stored)) is not None:
                return written
            expected = stored if stored != expected else b""  # overwrite the unsigned value, or start over if it was deleted

    def read(self, key: str) -> str | None:
        """Returns the text that an agent has written under `key`; None if there is none or it is not signed by an agent of the
        run."""
        return self._seal.opened(self._name(key), self.store.get(key)) if self.store.check([key]) else None

    def _signed(self, key: str, text: str) -> str:
        return self._seal.sign(self._name(key), text)

    def _name(self, key: str) -> str:
        return f"{self._part}/{key}"


class Ending:
    """Tells all nodes how the run ended: the first node that knows publishes it. If the store cannot be reached, the methods do
    nothing and raise no error."""

    def __init__(self, board: Board) -> None:
        """`board` must be the board that all rounds of the rendezvous share."""
        self._board = board

    def say(self, document: dict[str, Any]) -> None:
        """Publishes `document`, the description of how the run ended (`processes._tell`), unless a node has already published one.

        Does nothing if the store cannot be reached.
        """
        with contextlib.suppress(RuntimeError):
            self._board.write_first(_ENDING, json.dumps(document))

    def heard(self, patience_seconds: float = 0.0) -> dict[str, Any] | None:
        """Returns the published description of how the run ended, waiting up to `patience_seconds` for it.

        Returns None if there is none by then or the store cannot be reached.
        """
        deadline = time.monotonic() + patience_seconds
        with contextlib.suppress(RuntimeError):
            while (said := self._board.read(_ENDING)) is None and time.monotonic() < deadline:
                time.sleep(0.05)
            if said is not None:
                document: dict[str, Any] = json.loads(said)
                return document
        return None

    def leave(self) -> None:
        """Count this agent among those that no longer use the store. The count is not signed: forging it only makes the store's
        host leave sooner."""
        with contextlib.suppress(RuntimeError):
            self._board.store.add(_LEFT, 1)

    def await_leaving(self, nodes: int, patience_seconds: float, stop: Callable[[], bool] = lambda: False) -> None:
        """Wait until `nodes` agents have called `leave`, `patience_seconds` have passed or `stop()` is true. The store's host calls
        this, because it leaves last."""
        deadline = time.monotonic() + patience_seconds
        with contextlib.suppress(RuntimeError):
            while self._board.store.add(_LEFT, 0) < nodes and time.monotonic() < deadline and not stop():
                time.sleep(0.05)


def backend_of_all(board: Board, own: str) -> str:
    """Publishes `own`, this node's backend, if no node has published its backend yet. Returns the published backend, which all
    nodes must use. Raises RuntimeError if the store cannot be reached."""
    return board.write_first(_BACKEND, own)


def ask_to_regroup(board: Board) -> None:
    """Tell the agents of this round of the rendezvous that the workers are stopping only so that a waiting node can join."""
    board.write(_REGROUP)


def regrouping(board: Board) -> bool:
    """Returns whether an agent of this round has called `ask_to_regroup`."""
    return board.read(_REGROUP) is not None


def say_trained(board: Board, summary: dict[str, Any]) -> None:
    """Tell the agents of this round that the training ranks have finished, with their `summary`."""
    board.write(_TRAINED, json.dumps(summary))


def trained(board: Board) -> dict[str, Any] | None:
    """Returns the summary that an agent of this round has published with `say_trained`; None if no agent has."""
    written = board.read(_TRAINED)
    summary: dict[str, Any] | None = None if written is None else json.loads(written)
    return summary

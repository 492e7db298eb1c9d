"""What the agents of a run's nodes tell each other, beside elastic's rendezvous."""

import contextlib
import json
import time
from typing import Any

from torch._C._distributed_c10d import Store

_ENDING, _READ = "ending", "ending/read"
_REGROUP, _TRAINED = "bagualu/regroup", "bagualu/trained"
LEAVE_SECONDS = 5.0
"""For the others to say or to hear it."""


class Ending:
    """How the run has ended, for all nodes; the first that knows says it. Nothing is heard when the store's host is gone."""

    def __init__(self, store: Store) -> None:
        """`store`: the one that all rounds of the rendezvous share."""
        self._store = store
        self._counted = False

    def say(self, document: dict[str, Any]) -> None:
        with contextlib.suppress(RuntimeError):
            self._store.compare_set(_ENDING, "", json.dumps(document))

    def heard(self, patience_seconds: float = 0.0) -> dict[str, Any] | None:
        """What a node has said, or says within so many seconds."""
        deadline = time.monotonic() + patience_seconds
        with contextlib.suppress(RuntimeError):
            while not (said := self._store.check([_ENDING])) and time.monotonic() < deadline:
                time.sleep(0.05)
            if said:
                document: dict[str, Any] = json.loads(self._store.get(_ENDING))
                if not self._counted:
                    self._store.add(_READ, 1)
                self._counted = True
                return document
        return None

    def wait_for(self, nodes: int) -> None:
        """Until so many nodes have heard it, but not for long: the store may go when this process does."""
        deadline = time.monotonic() + LEAVE_SECONDS
        with contextlib.suppress(RuntimeError):
            while self._store.add(_READ, 0) < nodes and time.monotonic() < deadline:
                time.sleep(0.05)


def ask_to_regroup(round_store: Store) -> None:
    """Tell the agents of this round that its workers stop only to let a node in."""
    round_store.set(_REGROUP, "")


def regrouping(round_store: Store) -> bool:
    """Whether an agent of this round has said so."""
    return bool(round_store.check([_REGROUP]))


def say_trained(round_store: Store, summary: dict[str, Any]) -> None:
    """Tell the agents of this round that the ranks that train are through."""
    round_store.set(_TRAINED, json.dumps(summary))


def trained(round_store: Store) -> dict[str, Any] | None:
    """The summary, if an agent of this round has said so."""
    if not round_store.check([_TRAINED]):
        return None
    summary: dict[str, Any] = json.loads(round_store.get(_TRAINED))
    return summary

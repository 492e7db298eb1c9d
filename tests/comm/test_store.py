"""Who listens, and on which address."""

import os
import sys
from datetime import timedelta

import pytest
from torch._C._distributed_c10d import TCPStore

from bagualu.comm.store import serve, store_of
from bagualu.comm.world import World
from tests.listening import listening

TIMEOUT = timedelta(seconds=30)
pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")


def test_a_store_listens_on_its_address_alone() -> None:
    store = serve("127.0.0.1", 0, TIMEOUT)
    assert listening(os.getpid())[os.getpid(), store.port] == "127.0.0.1"
    store.set("key", "value")
    assert TCPStore("127.0.0.1", store.port, is_master=False, timeout=TIMEOUT).get("key") == b"value"


def test_a_port_that_is_taken_is_an_error() -> None:
    store = serve("127.0.0.1", 0, TIMEOUT)
    with pytest.raises(OSError, match="in use"):
        serve("127.0.0.1", store.port, TIMEOUT)


def test_rank_0_of_a_world_started_by_hand_listens_on_the_address_that_was_given(monkeypatch: pytest.MonkeyPatch) -> None:
    free = serve("127.0.0.1", 0, TIMEOUT)
    port = free.port
    del free
    monkeypatch.setenv("MASTER_ADDR", "localhost")
    monkeypatch.setenv("MASTER_PORT", str(port))
    store = store_of(World(0, 2, rendezvous="env://", serves=("localhost", port)), TIMEOUT)
    assert listening(os.getpid())[os.getpid(), port] == "127.0.0.1"
    other = store_of(World(1, 2, rendezvous="env://"), TIMEOUT)
    store.set("key", "value")
    assert other.get("key") == b"value"

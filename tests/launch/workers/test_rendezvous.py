"""Where agents meet: who holds the store, and on which address."""

import os
import socket
import sys
import threading

import pytest
from torch.distributed.elastic.rendezvous import RendezvousError, dynamic_rendezvous

from bagualu.comm.errors import RecipeError
from bagualu.fault_tolerance.config import RestartConfig
from bagualu.launch.workers import rendezvous
from bagualu.launch.workers.elastic_private import name_of_caller
from bagualu.launch.workers.rendezvous_config import Meeting
from tests.listening import listening

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
CONFIG = RestartConfig(wait_seconds=30)


@pytest.fixture
def meeting():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    return lambda secret="x" * 32, nodes=2: Meeting("localhost", port, "test", "test", nodes, nodes, secret)


def never():
    return False


def test_the_store_of_several_nodes_listens_on_the_address_of_the_meeting_alone(meeting):
    first = rendezvous.among(meeting(), CONFIG, never)
    second = rendezvous.among(meeting(), CONFIG, never)
    assert (first.hosts, second.hosts) == (True, False)
    assert listening(os.getpid())[os.getpid(), meeting().port] == "127.0.0.1"
    first.board.write("key", "value")
    assert second.board.read("key") == "value"


def test_two_nodes_with_one_secret_meet_and_give_their_workers_that_store(meeting):
    found, before = [], set(listening(os.getpid()))

    def meet():
        found.append(rendezvous.among(meeting(), CONFIG, never).handler.next_rendezvous())

    nodes = [threading.Thread(target=meet, daemon=True) for _ in range(2)]
    for node in nodes:
        node.start()
    for node in nodes:
        node.join(60)
    assert sorted(info.rank for info in found) == [0, 1]
    assert {(info.bootstrap_store_info.master_addr, info.bootstrap_store_info.master_port) for info in found} == {
        ("127.0.0.1", meeting().port)
    }
    assert len(set(listening(os.getpid())) - before) <= 1, "one store for agents and workers"


def test_nodes_with_different_secrets_do_not_meet_and_say_why(meeting, capsys):
    config = RestartConfig(wait_seconds=3)
    failed = []

    def meet(secret):
        try:
            rendezvous.among(meeting(secret), config, never).handler.next_rendezvous()
        except RendezvousError as error:
            failed.append(error)

    nodes = [threading.Thread(target=meet, args=(letter * 32,), daemon=True) for letter in "xy"]
    for node in nodes:
        node.start()
    for node in nodes:
        node.join(60)
    assert len(failed) == 2
    assert "give all nodes the same BAGUALU_SECRET" in capsys.readouterr().err


def test_a_port_that_may_not_be_listened_on_is_refused_with_the_fix(meeting, monkeypatch):
    def forbidden(*_):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(rendezvous, "serve", forbidden)
    with pytest.raises(RecipeError, match=r"cannot listen at 127\.0\.0\.1 port .*Permission denied.* give --meet another port"):
        rendezvous.among(meeting(), CONFIG, never)


def test_events_of_a_rendezvous_are_named_as_elastic_names_them():
    """Without the source of every frame, which takes its own function most of the time of a start."""

    def record():
        return dynamic_rendezvous.get_method_name()

    assert dynamic_rendezvous.get_method_name is name_of_caller
    assert record() == "test_events_of_a_rendezvous_are_named_as_elastic_names_them"

"""What agents tell each other, in a store into which strangers write too."""

import json
import pickle
import threading
from datetime import timedelta

import pytest
from torch._C._distributed_c10d import HashStore

from bagualu.launch.workers.agent_messages import Board, Ending, ask_to_regroup, backend_of_all, regrouping, say_trained, trained
from bagualu.launch.workers.elastic_private import SignedBackend
from bagualu.launch.workers.secret import Seal

SEAL, STRANGER = Seal("x" * 32, "run"), Seal("y" * 32, "run")
JUNK = b"\xff junk"


@pytest.fixture
def store():
    store = HashStore()
    store.set_timeout(timedelta(seconds=30))
    return store


def test_the_first_ending_counts_on_all_nodes(store):
    first, second = (Ending(Board(store, SEAL, "part")) for _ in range(2))
    assert second.heard() is None
    first.say({"summary": None, "failure": {"cause": "this"}})
    second.say({"summary": {}, "failure": None})
    assert second.heard() == first.heard() == {"summary": None, "failure": {"cause": "this"}}


@pytest.mark.parametrize("other", [b"junk", JUNK, Board(HashStore(), STRANGER, "part")._signed("ending", "{}").encode(),
                                   Board(HashStore(), SEAL, "another part")._signed("ending", "{}").encode()])  # fmt: skip
def test_an_ending_that_no_agent_has_signed_is_ignored_with_one_line_and_replaced(store, capsys, other):
    store.set("ending", other)
    ending = Ending(Board(store, Seal("x" * 32, "run"), "part"))
    assert ending.heard() is None
    assert ending.heard() is None
    assert capsys.readouterr().err.count("\n") == 1
    ending.say({"ended": "well"})
    assert ending.heard() == {"ended": "well"}


def test_words_of_a_round_count_when_they_are_signed(store):
    board = Board(store, SEAL, "run/1")
    store.set("bagualu/regroup", "")
    store.set("bagualu/trained", json.dumps({"step": 1}))
    assert not regrouping(board)
    assert trained(board) is None
    ask_to_regroup(board)
    say_trained(board, {"step": 2})
    assert regrouping(board)
    assert trained(board) == {"step": 2}


def test_the_first_node_says_the_backend_of_all(store):
    assert backend_of_all(Board(store, SEAL, "part"), "nccl") == "nccl"
    assert backend_of_all(Board(store, SEAL, "part"), "gloo") == "nccl"


def test_the_store_s_host_leaves_when_all_have_left(store):
    host, other = (Ending(Board(store, SEAL, "part")) for _ in range(2))
    host.leave()
    waits = threading.Thread(target=host.await_leaving, args=(2, 60), daemon=True)
    waits.start()
    waits.join(0.2)
    assert waits.is_alive()
    other.leave()
    waits.join(60)
    assert not waits.is_alive()


class Runs:
    """Unpickled, it shows that a stranger's program ran."""

    def __reduce__(self):
        return (exec, ("raise SystemExit('a stranger\\'s program ran')",))


def test_the_state_of_the_rendezvous_counts_when_it_is_signed(store):
    one, other = SignedBackend(store, "id", SEAL), SignedBackend(store, "id", SEAL)
    assert one.get_state() is None
    state, token, has_set = one.set_state(b"first")
    assert (state, has_set) == (b"first", True)
    assert other.get_state() == (b"first", token)
    assert other.set_state(b"second", token)[::2] == (b"second", True)
    assert one.set_state(b"late", token)[::2] == (b"second", False)
    assert one.set_state(b"without having looked")[::2] == (b"second", False)


@pytest.mark.parametrize("junk", [JUNK, b"", pickle.dumps(Runs()), STRANGER.sign("torch.rendezvous.id", "bWluZQ==").encode()])
def test_a_state_that_no_agent_has_signed_is_replaced_by_the_one_before(store, junk):
    backend = SignedBackend(store, "id", Seal("x" * 32, "run"))
    backend.set_state(b"first")
    store.set("torch.rendezvous.id", junk)
    state, token = backend.get_state()
    assert state == b"first"
    assert backend.set_state(b"second", token)[::2] == (b"second", True)
    assert backend.get_state()[0] == b"second"


@pytest.mark.parametrize("junk", [JUNK, pickle.dumps(Runs())])
def test_an_agent_that_comes_to_such_a_state_begins_anew(store, junk):
    store.set("torch.rendezvous.id", junk)
    backend = SignedBackend(store, "id", Seal("x" * 32, "run"))
    assert backend.get_state() is None
    assert backend.set_state(b"first")[::2] == (b"first", True)

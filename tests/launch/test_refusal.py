"""A node that is refused: the others end with its reason, and nobody is told to remove another job's run. Who leaves last."""

import subprocess
import sys
import threading
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest
from torch.distributed.elastic.agent.server.api import RunResult, WorkerState
from torch.distributed.elastic.rendezvous.api import RendezvousClosedError

from bagualu.comm.errors import RecipeError
from bagualu.fault_tolerance import run_lock
from bagualu.fault_tolerance.config import RestartConfig
from bagualu.launch import node
from bagualu.launch.workers import processes, rendezvous, secret
from bagualu.launch.workers.agent_messages import Ending, backend_of_all
from bagualu.launch.workers.ended import refused
from bagualu.launch.workers.run import _advice
from bagualu.trainer.process.failure import Failure
from bagualu.trainer.process.stop_request import StopRequest
from bagualu.trainer.recipe.config import Recipe, RunConfig
from tests.launch.workers.test_rendezvous import CONFIG, meeting, never

__all__ = ["meeting"]
HOLD = """
import sys
from pathlib import Path
from bagualu.fault_tolerance import run_lock
with run_lock.hold(Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""


def recipe(folder: Path, **restart) -> Recipe:
    return Recipe(run=RunConfig(dir=str(folder)), restart=RestartConfig(wait_seconds=30, **restart))


def refuse(folder, meeting, error, **restart):
    ended = refused(error)
    return threading.Thread(
        target=processes.tell_early, args=(recipe(folder, **restart), meeting, ended, StopRequest()), daemon=True
    )  # fmt: skip


def test_the_others_hear_why_the_node_with_the_store_was_refused(tmp_path, meeting):
    host = refuse(tmp_path, meeting(), RecipeError("run.dir=x is in use by job 7; wait for it to end"))
    waits = threading.Thread(target=rendezvous._reached, args=(meeting(), "127.0.0.1", 60, never), daemon=True)
    waits.start()  # before the store is there
    host.start()
    waits.join(60)
    place = rendezvous.among(meeting(), CONFIG, never)
    ending = Ending(place.board)
    heard = ending.heard(30)
    with pytest.raises(RendezvousClosedError):
        place.handler.next_rendezvous()
    ending.leave()
    host.join(20)
    assert not host.is_alive(), "it leaves when all have heard it"
    failure = Failure(**heard["failure"])
    assert (failure.kind, failure.exit_code) == ("recipe", 2)
    assert failure.cause == "run.dir=x is in use by job 7; wait for it to end"


@pytest.mark.parametrize("elastic", [False, True])
def test_the_others_hear_why_a_node_was_refused_that_the_run_cannot_do_without(tmp_path, meeting, elastic):
    host = rendezvous.among(meeting(), CONFIG, never)
    other = refuse(tmp_path, meeting(), RecipeError("node2 has no GPU"), elastic=elastic, min_workers=2)
    other.start()
    other.join(20)
    assert not other.is_alive(), "it does not wait for the others"
    heard = Ending(host.board).heard()
    assert elastic == (heard is None), "an elastic run can go on without it"
    if not elastic:
        assert Failure(**heard["failure"]).cause == "node2 has no GPU"
        with pytest.raises(RendezvousClosedError):
            host.handler.next_rendezvous()


def test_a_node_with_another_backend_is_refused(tmp_path, meeting):
    host, other = (rendezvous.among(meeting(), CONFIG, never) for _ in range(2))
    assert backend_of_all(host.board, "nccl") == "nccl"
    gloo = recipe(tmp_path)
    gloo.comm.backend = "gloo"
    with pytest.raises(RecipeError, match=r"has comm.backend=gloo, but the nodes that started before it have nccl; give the same"):
        processes._require_same_backend(gloo, other)


def test_only_a_run_directory_with_a_free_lock_is_to_be_removed(tmp_path):
    failed, folder = Failure(0, "start", "this", 0.0), tmp_path / "run"
    folder.mkdir()
    advice = f"give another run.dir or remove {folder}, and start again"
    assert _advice(recipe(folder), failed, begun=False) == advice, "there is no lock"
    with run_lock.hold(folder):
        assert _advice(recipe(folder), failed, begun=False) == advice, "it is this process's own"
    holder = subprocess.Popen([sys.executable, "-c", HOLD, folder], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    try:
        assert holder.stdout.readline() == b"held\n"
        assert _advice(recipe(folder), failed, begun=False) == "give another run.dir and start again"
    finally:
        holder.communicate()
    assert _advice(recipe(folder), failed, begun=False) == advice


def test_a_node_that_finds_the_run_directory_in_use_tells_the_others(tmp_path, meeting, monkeypatch):
    place, folder, heard = meeting(), tmp_path / "run", []
    folder.mkdir()
    monkeypatch.setenv(secret.VARIABLE, place.secret)

    def listen():
        ending = Ending(rendezvous.among(place, CONFIG, never).board)
        heard.append(ending.heard(30))
        ending.leave()

    other = threading.Thread(target=listen, daemon=True)
    holder = subprocess.Popen([sys.executable, "-c", HOLD, folder], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    try:
        assert holder.stdout.readline() == b"held\n"
        other.start()
        words = ["recipe=tiny", "launch.nodes=2", "restart.wait_seconds=5", "checkpoint.resume=true", f"run.dir={folder}"]
        assert node.main(["--meet", f"{place.host}:{place.port}", "--id", place.id, *words]) == 2
    finally:
        holder.communicate()
    other.join(60)
    assert f"run.dir={folder} is in use by " in Failure(**heard[0]["failure"]).cause


def test_a_node_that_cannot_write_the_recipe_tells_the_others_with_the_same_secret(tmp_path, meeting, monkeypatch):
    place, heard = meeting(), []
    monkeypatch.setenv(secret.VARIABLE, place.secret)

    def full(recipe):
        other.start()  # this node hosts the store already
        raise RecipeError("the disk is full")

    def listen():
        ending = Ending(rendezvous.among(place, CONFIG, never).board)
        heard.append(ending.heard(30))
        ending.leave()

    monkeypatch.setattr("bagualu.trainer.output.start.save_recipe", full)
    other = threading.Thread(target=listen, daemon=True)
    words = ["recipe=tiny", "launch.nodes=2", "restart.wait_seconds=5", "checkpoint.resume=true", f"run.dir={tmp_path}/run"]
    assert node.main(["--meet", f"{place.host}:{place.port}", "--id", place.id, *words]) == 2
    other.join(60)
    assert Failure(**heard[0]["failure"]).cause == "the disk is full"


def test_the_node_with_the_store_leaves_last_at_a_healthy_end(meeting):
    """Else the others, which still ask, print the traces of torch's store."""
    host, other = (rendezvous.among(meeting(), CONFIG, never) for _ in range(2))
    agent = SimpleNamespace(
        suspending=nullcontext, stop_asked=False, run=lambda: RunResult(WorkerState.SUCCEEDED), failure=None,
        summary={"ended": "done"}, has_rank_0=True, nodes=2,
    )  # fmt: skip
    ends = threading.Thread(target=processes._run_agent, args=(agent, host, Ending(host.board), meeting()), daemon=True)
    ends.start()
    ending = Ending(other.board)
    assert ending.heard(30) == {"summary": {"ended": "done"}, "failure": None}
    ends.join(0.5)
    assert ends.is_alive()
    ending.leave()
    ends.join(30)
    assert not ends.is_alive()

"""Several nodes, each with an agent: here all on this machine, two workers each."""

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from bagualu.fault_tolerance.checkpoint.layout.directory import latest
from bagualu.launch.node import main
from tests.launch.conftest import PATHS
from tests.launch.survival import SMALL, finish, small
from tests.launch.warm import Launcher
from tests.standing import assert_names_rank_phase_and_cause, assert_stood

LINUX = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
pytestmark = [LINUX, pytest.mark.timeout(300)]
WORDS = ["parallel.data=4", "train.steps=30", "checkpoint.every=5"]
MOST_LOST = 10
COMMAND = "import sys; from bagualu.launch.node import main; sys.exit(main(entrypoint='faulty:train'))"


class Nodes:
    """Agents of one run."""

    def __init__(self, folder: Path, environment: dict[str, str], *words: str) -> None:
        with socket.create_server(("127.0.0.1", 0)) as taken:
            self.place = taken.getsockname()
        self.folder, self.environment = folder / "run", environment
        self.words = ["--meet", "{}:{}".format(*self.place), "--id", "test", *SMALL, *WORDS, "launch.nodes=2", "launch.workers=2",
                      "checkpoint.resume=true", f"run.dir={self.folder}", *words]  # fmt: skip
        self.agents: list[subprocess.Popen[str]] = []

    def start(self, cold: bool = False) -> subprocess.Popen[str]:
        """`cold`: with nothing imported yet, as people start it."""
        path = self.folder.parent / f"agent-{len(self.agents)}.err"
        own = {**self.environment, "PYTHONPATH": PATHS}
        if cold:
            agent = subprocess.Popen(
                [sys.executable, "-c", COMMAND, *self.words], text=True, stdout=subprocess.DEVNULL, stderr=path.open("w"),
                cwd=self.folder.parent, start_new_session=True, env=own,
            )  # fmt: skip
        else:
            agent = Launcher(
                self.words, "faulty:train", "bagualu.launch.node", stdout=subprocess.DEVNULL, stderr=path.open("w"),
                cwd=self.folder.parent, env=own,
            )  # fmt: skip
        self.agents.append(agent)
        return self.agents[-1]

    def listens(self) -> bool:
        with socket.socket() as probe:
            return probe.connect_ex(self.place) == 0

    def said(self) -> str:
        return "\n".join(path.read_text() for path in sorted(self.folder.parent.glob("agent-*.err")))

    def steps(self) -> int:
        metrics = self.folder / "metrics.jsonl"
        return len(metrics.read_text().splitlines()) if metrics.exists() else 0

    def until(self, condition) -> None:
        deadline = time.monotonic() + 120
        while not condition():
            assert time.monotonic() < deadline, self.said()
            time.sleep(0.05)


@pytest.fixture
def nodes(tmp_path, leftovers):
    made = []

    def make(*words):
        made.append(Nodes(tmp_path, leftovers.environment, *words))
        made[-1].folder.mkdir()
        return made[-1]

    yield make
    for agent in (agent for one in made for agent in one.agents):
        if agent.poll() is None:
            os.killpg(agent.pid, signal.SIGKILL)
        agent.wait()


@pytest.fixture(scope="module")
def reference(undisturbed, tmp_path_factory):
    return lambda *words: undisturbed(small(tmp_path_factory.mktemp("unused"), *WORDS, *words), "gloo")


def test_an_elastic_run_goes_on_without_a_node_and_grows_back(nodes, reference):
    run = nodes("run.name=slow", "train.steps=80", "restart.elastic=true", "restart.wait_seconds=2", "restart.backoff_seconds=0")
    (run.folder / "slow").touch()
    stays = run.start()
    run.until(run.listens)  # the node that holds the store is the one that stays
    goes = run.start()
    run.until((run.folder / "started-4").exists)  # on a busy machine the first one may have begun alone
    together, alone = max(run.steps(), 5), "going on with 2 ranks of 2 workers: data 2"
    run.until(lambda: run.steps() >= together + 2)
    times = run.said().count(alone)
    goes.kill()
    run.until(lambda: run.said().count(alone) > times)
    before = run.steps()
    run.until(lambda: run.steps() >= before + 2)
    (run.folder / "started-4").unlink()
    back = run.start()
    run.until((run.folder / "started-4").exists)
    (run.folder / "slow").unlink()
    assert stays.wait(120) == 0, run.said()
    assert back.wait(60) == 0, run.said()
    assert_stood(run.folder, reference("train.steps=80"), MOST_LOST, exact=False)


def test_when_the_store_goes_with_its_node_the_others_end_and_say_so(nodes, reference):
    run = nodes("run.name=slow")
    (run.folder / "slow").touch()
    head = run.start()
    run.until(run.listens)
    other = run.start()
    run.until(lambda: run.steps() >= 2)
    head.kill()
    assert other.wait(60) == 1
    last = (run.folder.parent / "agent-1.err").read_text().splitlines()[-1]
    assert_names_rank_phase_and_cause(last)
    place = "{} at port {}".format(*run.place)
    assert f": the node that holds the rendezvous store, {place}, cannot be reached; " in last
    finish(run.folder, *WORDS)
    assert_stood(run.folder, reference(), MOST_LOST)


def test_what_ends_the_run_on_one_node_ends_it_on_all_with_the_same_words(nodes, reference):
    run = nodes("run.name=kill-3-7-backward", "restart.limit=0")
    agents = [run.start(cold=True), run.start()]
    assert [agent.wait(120) for agent in agents] == [1, 1], run.said()
    for number in (0, 1):
        last = (run.folder.parent / f"agent-{number}.err").read_text().splitlines()[-1]
        assert_names_rank_phase_and_cause(last)
        assert last.startswith("bagualu: failed: rank 3, step 7, backward: killed by SIGKILL"), run.said()
    finish(run.folder, *WORDS)
    assert_stood(run.folder, reference(), MOST_LOST)


def test_a_stop_on_one_node_saves_and_stops_all_and_until_then_another_job_is_refused(nodes, reference, capsys):
    run = nodes("run.name=slow")
    (run.folder / "slow").touch()
    run.environment["TORCH_CPP_LOG_LEVEL"] = "WARNING"
    agents = [run.start()]
    run.until(run.listens)
    agents.append(run.start(cold=True))  # torch takes the level when it is imported
    run.until(lambda: run.steps() >= 2)
    config = (run.folder / "config.yaml").stat()
    with socket.create_server(("127.0.0.1", 0)) as taken:
        elsewhere = "{}:{}".format(*taken.getsockname())
    assert main(["--meet", elsewhere, "--id", "other", *run.words[4:], "restart.wait_seconds=1"]) == 2
    said = capsys.readouterr().err
    assert any(f"is in use by job test, process {agent.pid} on {os.uname().nodename} since " in said for agent in agents), said
    assert (run.folder / "config.yaml").stat().st_mtime_ns == config.st_mtime_ns
    agents[1].send_signal(signal.SIGUSR1)
    assert [agent.wait(60) for agent in agents] == [75, 75], run.said()
    assert run.said().count(" (native, ZeRO-1) as 2 processes on each of 2 nodes with comm.backend=") == 2
    assert "frame #" not in run.said(), "the store's host has left before the other"
    assert latest(run.folder / "checkpoints").name == f"step-{run.steps():08}"
    finish(run.folder, *WORDS)
    assert_stood(run.folder, reference(), 0)


@pytest.mark.parametrize(
    ("words", "fix"),
    [
        (["--meet", "here", "--id", "x", "checkpoint.resume=true"], "--meet node1:29400"),
        (["--meet", "here:1", "--id", "x"], "checkpoint.resume=true"),
        (["--meet", "here:1", "--id", "x", "comm.backend=simulated"], "bagualu train"),
    ],
)
def test_what_cannot_work_is_refused_with_the_fix(capsys, words, fix):
    assert main(words) == 2
    assert fix in capsys.readouterr().err

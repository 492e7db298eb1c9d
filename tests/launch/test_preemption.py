"""Signals at every moment: all ranks save at one step, once, and the run goes on from there as if nothing had been."""

import signal

import pytest
import torch

from bagualu.comm import simulated
from bagualu.fault_tolerance.checkpoint.directory import latest, list_checkpoints
from bagualu.launch import local
from bagualu.launch.cli import main
from bagualu.launch.scratch import scratch
from bagualu.trainer.stopping import STOP_SIGNALS, StopRequest
from tests.launch.survival import SMALL, figures, small, state, undisturbed

WORDS = ["parallel.data=2", "parallel.tensor=1", "train.steps=6", "checkpoint.every=2", "train.validate_every=2",
         "comm.backend=simulated", "log.progress=off"]  # fmt: skip


@pytest.fixture(autouse=True)
def handlers():
    """Signals as a plain shell leaves them, and again after the test."""
    before = {number: signal.signal(number, signal.SIG_DFL) for number in STOP_SIGNALS}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    folder = tmp_path_factory.mktemp("undisturbed")
    recipe = small(folder, *WORDS)
    simulated.run(2, lambda communicator: undisturbed(communicator, recipe))
    return folder


def train(folder, *words):
    folder.mkdir(exist_ok=True)
    stop = StopRequest()
    stop.install()
    with scratch() as memory:
        return local.run_threads(small(folder, *WORDS, *words), 2, "tests.launch.faulty:train", False, memory, stop)


@pytest.mark.parametrize("point", ["data", "backward", "agree", "validate", "write", "commit"])
def test_wherever_it_comes_there_is_one_commit_and_the_run_goes_on_from_it(tmp_path, reference, point, capfd):
    """In step 4, and a second time in the save that follows."""
    folder = tmp_path / "run"
    ended = train(folder, f"run.name=stop-1-4-{point}.usr1-0-4-write")
    assert ended.summary["ended"] == "stopped"
    stopped = ended.summary["step"]
    assert stopped == (
        4 if point in ("data", "forward", "backward", "reduce", "agree") else 5
    )  # asked after the vote: the next one
    assert [line[0] for line in figures(folder)] == list(range(1, stopped + 1))
    assert latest(folder / "checkpoints").name == f"step-{stopped:08}"
    assert len(list_checkpoints(folder / "checkpoints")) == 2
    assert f"saved step {stopped}" in capfd.readouterr().err
    assert train(folder, "checkpoint.resume=true", "run.name=undisturbed").summary["ended"] == "done"
    assert figures(folder) == figures(reference)
    assert all(torch.equal(state(folder)[name], tensor) for name, tensor in state(reference).items())


def test_a_grace_too_short_leaves_the_checkpoint_before_and_says_not_saved(start, gone, capsys):
    words = [*SMALL, *WORDS, "comm.backend=gloo", "checkpoint.async=false", "run.name=stop-1-5-backward.hold-0-5-write"]
    run = start(*words, entrypoint="faulty:train")
    run.until((run.folder / "holding").exists)
    run.process.kill()
    _, _, err = run.end()
    assert "not saved yet" in err
    assert "saved step" not in err
    assert "not saved yet" in (run.folder / "logs" / "rank-1.log").read_text()
    assert latest(run.folder / "checkpoints").name == "step-00000004"
    assert main(["checkpoint", "verify", str(run.folder)]) == 0

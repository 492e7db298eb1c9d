"""Signals at every moment: all ranks save at one step, once, and the run goes on from there as if nothing had been."""

import shutil
import signal
import threading
import time

import pytest
from filelock import FileLock

from bagualu.fault_tolerance.checkpoint.layout.directory import latest, list_checkpoints
from bagualu.launch.cli import main
from bagualu.launch.workers import threads
from bagualu.launch.workers.ended import Ended
from bagualu.launch.workers.scratch import scratch
from bagualu.trainer.data.corpus import prepare
from bagualu.trainer.process.failure import Failure
from bagualu.trainer.process.stop_request import STOP_SIGNALS, StopRequest
from tests.launch.survival import SMALL, finish, small
from tests.standing import assert_stood, figures

WORDS = ["parallel.data=2", "parallel.tensor=1", "train.steps=6", "checkpoint.every=2", "train.validate_every=2",
         "comm.backend=simulated", "log.progress=off"]  # fmt: skip


@pytest.fixture(autouse=True)
def _handlers():
    """Signals as a plain shell leaves them, and again after the test."""
    before = {number: signal.signal(number, signal.SIG_DFL) for number in STOP_SIGNALS}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture(scope="module")
def reference(undisturbed, tmp_path_factory):
    return undisturbed(small(tmp_path_factory.mktemp("unused"), *WORDS), "simulated")


def train(folder, *words):
    folder.mkdir(exist_ok=True)
    stop = StopRequest()
    stop.install()
    with scratch() as memory:
        ended = threads.run_threads(small(folder, *WORDS, *words), 2, "tests.launch.faulty:train", False, memory, stop)
    assert ended.summary, ended.failure
    return ended


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
    assert [line["step"] for line in figures(folder)] == list(range(1, stopped + 1))
    assert latest(folder / "checkpoints").name == f"step-{stopped:08}"
    assert len(list_checkpoints(folder / "checkpoints")) == 2
    assert f"saved step {stopped}" in capfd.readouterr().err
    assert train(folder, "checkpoint.resume=true", "run.name=undisturbed").summary["ended"] == "done"
    assert_stood(folder, reference, 0)


def test_a_stop_ends_the_pause_before_a_restart(tmp_path, monkeypatch):
    stop, starts = StopRequest(), []

    def failing(*_):
        starts.append(1)
        return Ended(failure=Failure(0, "step", "x", 0.0))

    monkeypatch.setattr(threads, "_run_threads_once", failing)
    monkeypatch.setattr(threads.time, "sleep", lambda _: setattr(stop, "asked", True))
    recipe = small(tmp_path, *WORDS, "restart.backoff_seconds=600")
    ended = threads.run_threads(recipe, 2, "tests.launch.faulty:train", False, tmp_path, stop)
    assert (len(starts), ended.failure.cause) == (1, "x")


def test_a_grace_too_short_leaves_the_checkpoint_before_and_says_not_saved(start, reference, capsys):
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
    finish(run.folder, *WORDS, backend="simulated")
    assert_stood(run.folder, reference, 2)


def test_asked_while_another_process_still_prepares_the_data(tmp_path, undisturbed):
    """Nobody loads data beside the ranks, so this is the one time that a rank waits for data."""
    words = [f"data.source={tmp_path}/text", f"data.cache={tmp_path}/cache", "model.vocab=257"]
    (tmp_path / "text").mkdir()
    for number in range(40):
        (tmp_path / "text" / f"{number}.txt").write_text(f"{number} bottles of beer on the wall\n" * 20)
    recipe = small(tmp_path / "unused", *WORDS, *words)
    prepared = prepare(recipe.data, recipe.model.vocab).tokenizer_path.parent
    reference = undisturbed(recipe, "simulated")
    folder, aside = tmp_path / "run", prepared.with_name("aside")
    prepared.rename(aside)
    lock = FileLock(f"{prepared}.lock", thread_local=False)
    lock.acquire()

    def ask():
        while not (folder / "started-2").exists():
            time.sleep(0.01)
        for number in (signal.SIGUSR1, signal.SIGTERM, signal.SIGTERM):
            signal.pthread_kill(threading.main_thread().ident, number)  # as faulty.py does
            time.sleep(0.1)
        aside.rename(prepared)
        lock.release()

    asking = threading.Thread(target=ask)
    asking.start()
    ended = train(folder, *words)
    asking.join()
    assert (ended.summary["ended"], ended.summary["step"]) == ("stopped", 1)
    assert [path.name for path in list_checkpoints(folder / "checkpoints")] == ["step-00000001"]
    assert train(folder, *words, "checkpoint.resume=true").summary["ended"] == "done"
    assert_stood(folder, reference, 0)


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("g++"), reason="torch.compile needs a C++ compiler (g++ on PATH)")
def test_asked_while_a_layer_is_compiled(start, tmp_path, monkeypatch):
    """SIGUSR1 to one rank and SIGTERM to the other, the second one with the compiler at work; then SIGTERM in the save."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "compiled"))
    words = [*SMALL, *WORDS, "comm.backend=gloo", "train.compile=true"]
    run = start(*words, "run.name=usr1-1-1-compile.soon-0-1-compile.stop-0-1-write", entrypoint="faulty:train")
    code, _, err = run.end(200)
    assert code == 75, err
    assert "saved step 1" in err
    assert [path.name for path in list_checkpoints(run.folder / "checkpoints")] == ["step-00000001"]
    assert [line["step"] for line in figures(run.folder)] == [1]
    again = start(*words, "checkpoint.resume=true", entrypoint="faulty:train")
    assert again.end(200)[0] == 0
    other = start(*words, f"run.dir={tmp_path}/undisturbed", entrypoint="faulty:train")
    assert other.end(200)[0] == 0
    assert_stood(run.folder, tmp_path / "undisturbed", 0)

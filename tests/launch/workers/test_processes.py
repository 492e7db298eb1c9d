"""`bagualu train` with real worker processes: what they get, how they stop, how they fail, that none survives."""

import json
import os
import pty
import signal
import sys
import time
from pathlib import Path

import psutil
import pytest

from tests.launch.survival import FOUR, MOST_LOST, SMALL, finish, small
from tests.listening import listening, outside_interface
from tests.standing import assert_stood

LINUX = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
pytestmark = [LINUX, pytest.mark.timeout(300)]


TWO = ("parallel.data=2", "parallel.pipeline=1")
"""Two ranks, whose start takes half as long as that of four."""


def pids(ranks):
    return [rank["pid"] for rank in ranks]


def descendants(pid):
    """Every process that `pid` has started, itself or by way of others, but the remover of its folder (scratch.py)."""
    children = psutil.Process(pid).children(recursive=True)
    return [child.pid for child in children if child.name() not in ("sh", "cat", "sleep")]


def catches(pid, number):
    """Whether a process has a handler for a signal."""
    caught = next(line for line in Path(f"/proc/{pid}/status").read_text().splitlines() if line.startswith("SigCgt:"))
    return bool(int(caught.split()[1], 16) >> (number - 1) & 1)


def test_workers_get_threads_memory_logs_and_one_of_them_the_terminal_and_the_run_says_how_it_ended(start, gone):
    ours, theirs = pty.openpty()
    run = start("train.steps=3", "launch.threads=1", "--json", stderr=theirs, cold=True)
    os.close(theirs)
    shown = b""
    while chunk := _read(ours):
        shown += chunk
    code, out, _ = run.end()
    assert code == 0, shown
    assert b"\rat step 1\rat step 2\rat step 3" in shown
    assert json.loads(out)["ended"] == "done"
    ranks = [json.loads((run.folder / f"rank-{rank}.json").read_text()) for rank in range(4)]
    assert [rank["terminal"] for rank in ranks] == [True, False, False, False]  # its log has the lines too
    assert [rank["threads"] for rank in ranks] == [1] * 4
    assert len({rank["parent"] for rank in ranks}) == 1  # one process imported torch for all
    for on, left_out, runs in (rank["collector"] for rank in ranks):
        assert on
        assert left_out > 100_000  # objects: torch's
        assert runs < 10  # importing torch, it would have run thirty times, and a worker inherits that number
    pages = Path("/sys/kernel/mm/transparent_hugepage/enabled")
    if pages.exists() and "[never]" not in pages.read_text() and os.confstr("CS_GNU_LIBC_VERSION") >= "glibc 2.35":
        assert all(rank["huge_bytes"] >= 32 * 2**20 for rank in ranks)
    for rank in range(4):
        assert f"rank {rank} says hello" in (run.folder / "logs" / f"rank-{rank}.log").read_text()
    assert (run.folder / "config.yaml").exists()
    assert gone([*pids(ranks), ranks[0]["parent"]])


@pytest.mark.parametrize(("words", "needed"), [((), False), (("train.recompute=full",), True)])
def test_workers_load_torchs_compiler_only_where_it_is_needed_and_then_once_for_all(start, words, needed):
    layout = ["parallel.data=2", "parallel.pipeline=2", "model.moe.experts=2", "model.moe.ffn=8", "train.steps=2"]
    run = start(*SMALL, *layout, "checkpoint.every=1", "checkpoint.replica_every=1", *words, entrypoint="faulty:train")
    code, _, err = run.end()
    assert code == 0, err
    for rank in range(4):
        before, after = json.loads((run.folder / f"heavy-{rank}.json").read_text())
        assert before == after
        assert ("torch._dynamo" in after) == needed
        assert ("sympy" in after) == needed


@pytest.fixture(scope="module")
def reference(undisturbed, tmp_path_factory):
    return undisturbed(small(tmp_path_factory.mktemp("unused"), *FOUR), "gloo")


def test_the_first_failing_rank_is_named_not_its_peers_and_a_crash_loop_has_a_code_of_its_own(start, gone, reference):
    """Without what made it fail the run goes on from there."""
    run = start(*SMALL, *FOUR, "run.name=raise-2-5-forward", "restart.backoff_seconds=0", entrypoint="faulty:train")
    code, _, err = run.end()
    last = err.splitlines()[-1]
    assert code == 76
    assert last.startswith("bagualu: failed: rank 2, step 5, forward")
    assert "ValueError: no such thing (failed at this step 2 times" in last
    assert f"{run.folder}/logs/rank-2.log" in last
    assert "and more" in (run.folder / "logs" / "rank-2.log").read_text()
    assert gone([json.loads((run.folder / f"rank-{rank}.json").read_text())["pid"] for rank in range(4)])
    finish(run.folder, *FOUR)
    assert_stood(run.folder, reference, MOST_LOST)


def test_a_killed_worker_is_named_and_takes_the_others_along_within_2_seconds(start, gone, reference):
    """Also a rank (2) that does not communicate, and so does not notice."""
    run = start(*SMALL, *FOUR, "run.name=hold-2-5-forward", "restart.limit=0", entrypoint="faulty:train")
    ranks = run.started(step=4)
    os.kill(ranks[1]["pid"], signal.SIGKILL)
    assert gone(pids(ranks), within=2)
    code, _, err = run.end()
    assert code == 1
    assert "bagualu: failed: rank 1, step " in err.splitlines()[-1]
    assert "SIGKILL" in err.splitlines()[-1]
    finish(run.folder, *FOUR)
    assert_stood(run.folder, reference, MOST_LOST)


@pytest.mark.parametrize("way", ["ctrl-c", "sigusr1"])
def test_a_request_to_stop_ends_at_a_step_with_code_75(start, gone, way):
    """Within 2 seconds, where a step is short and there is nothing to save."""
    run = start(*TWO)
    ranks = run.started(ranks=2)
    if way == "ctrl-c":
        run.interrupt()
    else:
        run.process.send_signal(signal.SIGUSR1)
    assert gone(pids(ranks), within=2)
    code, out, err = run.end()
    assert code == 75, err
    assert "checkpoint.resume=true" in out


def test_a_run_listens_on_the_loopback_alone(start, monkeypatch):
    """Also where the machine's settings name an interface for runs on several machines."""
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", outside_interface() or "lo")
    run = start(*TWO)
    run.started(ranks=2)
    found = listening(run.process.pid)
    assert len({pid for pid, _ in found}) == 1 + 2, "the launcher's store, and Gloo in each rank"
    assert set(found.values()) == {"127.0.0.1"}
    run.process.send_signal(signal.SIGTERM)
    assert run.end()[0] == 75


@pytest.mark.parametrize("backend", ["gloo", pytest.param("simulated", marks=pytest.mark.slow)])
def test_a_request_to_stop_that_comes_while_it_starts_ends_it_with_code_75(start, backend):
    run = start(*TWO, f"comm.backend={backend}", cold=True)
    run.until(lambda: catches(run.process.pid, signal.SIGTERM))  # from there on it imports torch
    run.process.send_signal(signal.SIGTERM)
    code, _, err = run.end()
    assert code == 75, err
    last = err.splitlines()[-1]
    assert last.startswith("bagualu: stopped: asked to stop before anything was trained; nothing was done yet, ")
    assert not (run.folder / "metrics.jsonl").exists()
    typed = last.split("start again with ")[1]
    code, _, err = start(*TWO, f"comm.backend={backend}", "train.steps=3", typed).end()
    assert code == 0, err
    assert "at step 3" in err


@pytest.mark.parametrize("number", [signal.SIGINT, pytest.param(signal.SIGTERM, marks=pytest.mark.slow)])
def test_what_is_sent_to_the_whole_process_group_stops_workers_at_a_step_and_spares_their_children(start, number):
    """Ctrl-C in a terminal and the program `timeout` signal the whole process group. What a worker has started, such as a compiler,
    must survive that, because the worker still needs it to finish its step."""
    run = start(*TWO, "run.name=child")
    run.started(ranks=2)
    os.killpg(run.process.pid, number)
    code, _, err = run.end()
    assert code == 75, err
    assert [(run.folder / f"child-{rank}").read_text() for rank in range(2)] == ["None"] * 2


def test_ctrl_z_suspends_the_workers_too(start, gone):
    run = start(*TWO)
    ranks = run.started(ranks=2)
    everybody = [run.process.pid, *pids(ranks)]
    os.killpg(run.process.pid, signal.SIGTSTP)
    _until_all(everybody, lambda status: status == psutil.STATUS_STOPPED)
    os.killpg(run.process.pid, signal.SIGCONT)
    _until_all(everybody, lambda status: status != psutil.STATUS_STOPPED)
    run.interrupt()
    code, _, err = run.end()
    assert code == 75, err
    assert gone(everybody)


def _until_all(processes, condition):
    deadline = time.monotonic() + 20
    while not all(condition(psutil.Process(pid).status()) for pid in processes):
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.mark.parametrize("backend", ["gloo", pytest.param("simulated", marks=pytest.mark.slow)])
def test_a_second_ctrl_c_ends_a_run_that_will_not_stop(start, gone, backend):
    run = start(*TWO, "run.name=deaf", f"comm.backend={backend}")
    ranks = run.started(ranks=2)
    run.interrupt()
    run.started(2, step=len((run.folder / "metrics.jsonl").read_text().splitlines()) + 5)  # it does not listen
    run.interrupt()
    code, _, err = run.end()
    assert code == 1
    assert err.splitlines()[-1].startswith("bagualu: failed: no single rank, train: killed by a second Ctrl-C")
    assert gone(pids(ranks))


def test_no_process_outlives_a_killed_launcher_by_2_seconds(start, gone, reference):
    """Not even a rank that is stopped (1), nor one in which no Python runs because a thread keeps the lock (2)."""
    run = start(*SMALL, *FOUR, "run.name=gil-2-5-forward", entrypoint="faulty:train", cold=True)
    ranks = run.started(step=4)
    run.until((run.folder / "keeps-the-lock").exists)
    os.kill(ranks[1]["pid"], signal.SIGSTOP)
    family = descendants(run.process.pid)  # with the fork server and its resource tracker
    assert {*pids(ranks)} < {*family}
    run.process.kill()
    assert gone(family, within=2)
    finish(run.folder, *FOUR)
    assert_stood(run.folder, reference, MOST_LOST)


def test_the_folder_in_memory_is_gone_with_a_killed_launcher(start, gone):
    run = start(*TWO)
    ranks = run.started(ranks=2)
    run.process.kill()
    folder, deadline = Path(ranks[0]["scratch"]), time.monotonic() + 20
    while folder.exists():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_simulated_ranks_are_threads_of_one_process_and_stop_as_workers_do(start):
    run = start("comm.backend=simulated")
    assert set(pids(run.started())) == {run.process.pid}
    run.interrupt()
    code, _, err = run.end()
    assert code == 75, err


def test_a_sweep_runs_its_jobs_one_after_the_other_whatever_fails(start):
    run = start("comm.backend=simulated", "-m", "--json", "train.steps=2,4", "run.name=raise3,it", "restart.limit=0")
    code, out, err = run.end()
    assert code == 1, err
    documents = json.loads(out)
    assert [document["run_dir"] for document in documents] == [
        f"{run.folder}-train.steps={steps},run.name={name}" for steps in (2, 4) for name in ("raise3", "it")
    ]
    assert [document["ended"] for document in documents] == ["done", "done", "failed", "done"]
    assert (documents[2]["rank"], documents[2]["step"], documents[3]["step"]) == (3, 3, 4)
    assert "bagualu: sweep: 3 of 4 jobs done; the same command with checkpoint.resume=true repeats only what is not done" in err


def test_a_sweep_that_is_asked_to_stop_begins_no_other_job(start):
    run = start("-m", "--json", "run.seed=1,2", "launch.workers=2", "parallel.pipeline=1")
    first = run.folder.parent / "run-run.seed=1"
    run.until(lambda: (first / "metrics.jsonl").exists())
    run.interrupt()
    code, out, err = run.end()
    assert code == 75, err
    assert [document["ended"] for document in json.loads(out)] == ["stopped", "not begun"]
    assert err.splitlines()[-1] == f"  not begun: {run.folder}-run.seed=2"


def test_a_failing_thread_is_named(start):
    code, _, err = start("comm.backend=simulated", "run.name=raise3", "restart.limit=0").end()
    assert code == 1
    assert err.splitlines()[-1].startswith("bagualu: failed: rank 3, step 3, data")


def _read(terminal):
    try:
        return os.read(terminal, 4096)
    except OSError:  # the other end is closed
        return b""


def test_a_worker_that_ends_without_a_word_is_named(start):
    code, _, err = start(*TWO, "run.name=leave1", "restart.limit=0").end()
    assert code == 1
    assert "rank 1, step 3, data: ended with exit code 9" in err.splitlines()[-1]


def test_a_rank_that_fails_again_and_again_is_left_out_of_an_elastic_run(start, reference):
    words = [*SMALL, *FOUR, "run.name=raise-3-5-forward", "restart.elastic=true", "restart.backoff_seconds=0"]
    run = start(*words, entrypoint="faulty:train")
    code, _, err = run.end()
    assert code == 0, err
    assert "restart 2 of 3 without rank 3" in err
    assert "going on with 2 ranks of 3 workers: tensor 2" in err
    assert_stood(run.folder, reference, MOST_LOST, exact=False)


def test_a_failing_thread_is_started_again_too(start):
    code, _, err = start("comm.backend=simulated", "run.name=raise3", "restart.backoff_seconds=0").end()
    assert code == 76
    assert "restart 1 of 3" in err

"""summary.json under the real command: it says "running" while the run lasts, and then how the run ended. A start that
workers refuse changes neither this file nor config.yaml."""

import json
import os
import signal

import pytest

from bagualu.trainer.process.failure import DONE, FAILED, REFUSED, STOPPED
from bagualu.trainer.recipe.compose import compose, save_recipe

BEFORE = {"ended": "done", "step": 4, "steps": 4, "loss": 1.5}
SIMULATED = ["comm.backend=simulated", "parallel.data=1", "parallel.pipeline=1", "parallel.expert=1", "restart.limit=0"]


def summary_of(run):
    return json.loads((run.folder / "summary.json").read_text())


def write_before(folder):
    folder.mkdir()
    (folder / "summary.json").write_text(json.dumps(BEFORE))


@pytest.mark.parametrize(
    "words",
    [
        pytest.param(SIMULATED, id="simulated", marks=pytest.mark.slow),
        pytest.param(["launch.workers=1", *SIMULATED[1:]], id="gloo"),
    ],
)
def test_running_then_failed_or_stopped(start, tmp_path, words):
    write_before(tmp_path / "run")
    run = start("run.name=raise0", *words)
    assert run.end()[0] == FAILED
    failed = summary_of(run)
    assert (failed["ended"], failed["step"], failed["previous"]) == ("failed", 2, BEFORE)
    assert (failed["failure"]["rank"], failed["failure"]["step"]) == (0, 3)
    (run.folder / "metrics.jsonl").unlink()
    again = start("run.name=well", *words)
    again.started(ranks=1)
    assert (summary_of(again)["ended"], summary_of(again)["previous"]) == ("running", BEFORE)
    refused = start("run.name=well", *words)  # another job, in the same run directory
    assert refused.end()[0] == REFUSED
    assert summary_of(again)["ended"] == "running"
    again.interrupt()
    assert again.end()[0] == STOPPED
    assert summary_of(again)["ended"] == "stopped"


def test_after_a_kill_of_everything_it_is_still_running(start, tmp_path):
    write_before(tmp_path / "run")
    run = start("run.name=well", *SIMULATED)
    run.started(ranks=1)
    os.killpg(run.process.pid, signal.SIGKILL)
    run.process.wait()
    assert (summary_of(run)["ended"], summary_of(run)["previous"]) == ("running", BEFORE)
    (run.folder / "metrics.jsonl").unlink()
    done = start("run.name=well", *SIMULATED, "train.steps=3")
    assert done.end()[0] == DONE
    assert (summary_of(done)["ended"], summary_of(done)["step"]) == ("done", 3)


@pytest.mark.parametrize("words", [SIMULATED, ["launch.workers=1", *SIMULATED[1:]]], ids=["simulated", "gloo"])
def test_what_workers_refuse_leaves_both_files_as_they_were(start, tmp_path, words):
    write_before(tmp_path / "run")
    recipe = save_recipe(compose(["recipe=tiny", f"run.dir={tmp_path}/run", "optim.lr=0.5"]))
    before = recipe.read_text()
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "short.txt").write_text("too short")
    run = start(*words, f"data.source={tmp_path}/text", "model.vocab=257", entrypoint="bagualu.trainer.run:train")
    code, _, err = run.end()
    assert code == REFUSED, err
    assert summary_of(run) == BEFORE
    assert recipe.read_text() == before

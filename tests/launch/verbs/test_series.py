"""A sweep goes on after a failure, ends when it is asked to stop, and says what is not done. The runs are stand-ins."""

import json

import pytest

from bagualu.comm.errors import RecipeError
from bagualu.fault_tolerance import run_lock
from bagualu.launch.verbs.series import Series
from bagualu.launch.verbs.sweep import jobs
from bagualu.trainer.process.failure import Failure
from bagualu.trainer.process.stop_request import StopRequest
from bagualu.trainer.recipe.compose import save_recipe

FAILED = {"ended": "failed", **Failure(3, "step 3, work", "ValueError: no such thing", 1.0).as_dict()}
LOOPED = {"ended": "failed", **Failure(1, "step 2, backward", "again", 1.0, "loop").as_dict()}


@pytest.fixture
def swept(tmp_path):
    """swept(ends, *overrides) -> exit code, documents, numbers of the jobs that were run. Each of `ends` is what a run does."""

    def run_all(ends, *overrides):
        stop, run = StopRequest(), []
        listed = ",".join(map(str, range(len(ends))))
        series = Series(jobs([f"run.seed={listed}", f"run.dir={tmp_path}/run", *overrides]), stop)

        def one(recipe):
            run.append(recipe.run.seed)
            ended = ends[recipe.run.seed]
            if isinstance(ended, BaseException):
                raise ended
            stop.asked = ended[0] == "asked"
            return ended[1:] if stop.asked else ended

        return *series.run(one), run

    return run_all


def done(**more):
    return 0, {"ended": "done", "step": 3, **more}


def test_all_done(swept, capsys):
    code, documents, run = swept([done(), done()])
    assert (code, run) == (0, [0, 1])
    assert [document["ended"] for document in documents] == ["done", "done"]
    assert capsys.readouterr().err == "bagualu: sweep: 2 of 2 jobs done\n"


def test_the_rest_is_run_after_failures_and_the_first_one_gives_the_exit_code(swept, capsys, tmp_path):
    code, documents, run = swept([done(), (76, LOOPED), (1, FAILED), done()])
    assert (code, run) == (76, [0, 1, 2, 3])
    assert [document["ended"] for document in documents] == ["done", "failed", "failed", "done"]
    assert documents[2]["run_dir"] == f"{tmp_path}/run-run.seed=2"
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == (
        "bagualu: sweep: 2 of 4 jobs done; the same command with checkpoint.resume=true repeats only what is not done"
    )  # fmt: skip
    assert lines[1] == f"  failed (exit code 76): {tmp_path}/run-run.seed=1: again"
    assert lines[2] == f"  failed (exit code 1): {tmp_path}/run-run.seed=2: ValueError: no such thing"
    assert lines[3].startswith(f"bagualu: failed: rank 1, step 2, backward: again; in {tmp_path}/run-run.seed=1: ")


@pytest.mark.parametrize(
    ("end", "code", "ended"),
    [
        ((75, {"ended": "stopped", "step": 2}), 75, "stopped"),
        (("asked", 0, {"ended": "done"}), 75, "done"),  # asked at its last step
        (("asked", 1, FAILED), 1, "failed"),  # such as a second Ctrl-C
        (KeyboardInterrupt(), 130, "interrupted"),
    ],
)
def test_nothing_is_begun_after_a_request_to_stop(swept, capsys, tmp_path, end, code, ended):
    exit_code, documents, run = swept([end, done(), done()])
    assert (exit_code, run) == (code, [0])
    assert documents[0]["ended"] == ended
    assert documents[1:] == [{"ended": "not begun", "run_dir": f"{tmp_path}/run-run.seed={seed}"} for seed in (1, 2)]
    said = capsys.readouterr().err
    assert f"  not begun: {tmp_path}/run-run.seed=1\n  not begun: {tmp_path}/run-run.seed=2\n" in said


def test_a_failure_before_the_stop_gives_the_exit_code(swept):
    assert swept([(1, FAILED), (75, {"ended": "stopped"}), done()])[0] == 1


@pytest.mark.parametrize("error", [RecipeError("run.dir=x is in use"), OSError(28, "No space left on device", "x/config.yaml")])
def test_a_job_that_cannot_begin_is_a_failure_like_others(swept, capsys, error):
    code, documents, run = swept([error, done()])
    assert (code, run) == (2 if isinstance(error, RecipeError) else 1, [0, 1])
    assert "in use" in documents[0].get("error", "") or "No space left on device: x/config.yaml" in documents[0]["cause"]
    assert "1 of 2 jobs done" in capsys.readouterr().err


def test_a_run_directory_in_use_is_refused_at_once_and_the_others_are_run(swept, capsys, tmp_path):
    with run_lock.hold(tmp_path / "run-run.seed=1"):
        code, documents, run = swept([done(), done(), done()])
    assert (code, run) == (2, [0, 2])
    assert documents[1]["ended"] == "refused"
    assert "is in use by process" in documents[1]["error"]
    assert capsys.readouterr().err.splitlines()[0].startswith(f"bagualu: error: run.dir={tmp_path}/run-run.seed=1 is in use")


def test_only_what_is_not_done_is_repeated(swept, capsys, tmp_path):
    words = ["train.steps=3", "checkpoint.resume=true"]
    for seed, summary in enumerate(['{"ended": "done", "step": 3, "loss": 1.5}', '{"ended": "done", "step": 2}',
                                    '{"ended": "failed", "step": 3}', '{"ended', "[]"]):  # fmt: skip
        folder = tmp_path / f"run-run.seed={seed}"
        folder.mkdir()
        (folder / "summary.json").write_text(summary)
    code, documents, run = swept([done()] * 6, *words)
    assert (code, run) == (0, [1, 2, 3, 4, 5])
    assert documents[0] == {"run_dir": f"{tmp_path}/run-run.seed=0", "ended": "done", "step": 3, "loss": 1.5}
    assert f"{tmp_path}/run-run.seed=0 is already done" in capsys.readouterr().err
    assert "same command repeats" in (swept([(1, FAILED)], "checkpoint.resume=true", "run.name=1,2") and capsys.readouterr().err)


def test_a_run_that_is_there_is_neither_repeated_nor_taken_for_done_without_resume(swept, capsys, tmp_path):
    (job,) = jobs(["run.seed=choice(0)", f"run.dir={tmp_path}/run"])
    save_recipe(job.recipe)
    (tmp_path / "run-run.seed=0" / "metrics.jsonl").write_text('{"step": 1}\n')
    (tmp_path / "run-run.seed=0" / "summary.json").write_text('{"ended": "done", "step": 300}')
    code, documents, run = swept([done(), done()])
    assert (code, run) == (2, [1])
    assert "already holds a run; go on with checkpoint.resume=true" in documents[0]["error"]
    assert json.dumps(documents)

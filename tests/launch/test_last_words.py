"""What the last line of a failed run tells to do helps, and does not only lead back to the failure."""

import re
import subprocess
import sys
from functools import partial

import pytest

from bagualu.launch.cli import main
from bagualu.trainer import run as whole_run
from bagualu.trainer.assemble import assemble
from tests.launch.survival import SMALL
from tests.trainer.faults import Injection, gradient

WORDS = ["comm.backend=simulated", "parallel.data=2", "train.steps=7", "checkpoint.every=2", "checkpoint.async=false",
         "log.progress=off", "guard.on_nonfinite=stop", "restart.backoff_seconds=0"]  # fmt: skip


@pytest.fixture
def bad_step(monkeypatch):
    """Step 5 gives a NaN whenever it is computed."""

    def assemble_faulty(*given):
        state = assemble(*given)
        state.mesh.monitor.observers.append(Injection(state, gradient("nan", always=True)))
        return state

    monkeypatch.setattr(whole_run, "train", partial(whole_run.train, assemble=assemble_faulty))


@pytest.mark.usefixtures("bad_step")
def test_after_a_step_that_fails_whenever_it_is_done_not_to_resume_alone_is_the_advice(tmp_path, capsys):
    words = ["train", *SMALL, *WORDS, f"run.dir={tmp_path}/run"]
    assert main(words) == 1
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("bagualu: failed: rank ")
    assert last.endswith("; with nothing changed it would only happen again")
    assert main([*words, "checkpoint.resume=true"]) == 1, "it does happen again"
    typed = re.search(r"leave its samples out with (guard\.leave_out=\[5\]), and go on .* with (checkpoint\.resume=true)", last)
    assert typed, last
    assert main([*words, *typed.groups()]) == 0, capsys.readouterr().err


@pytest.mark.parametrize("backend", ["gloo", pytest.param("simulated", marks=pytest.mark.slow)])
def test_a_refusal_by_the_workers_is_one_line_too_and_the_last(tmp_path, leftovers, backend):
    (tmp_path / "corpus").mkdir()
    (tmp_path / "corpus/small.txt").write_text("abc")
    words = ["train", "recipe=tiny_dense", f"comm.backend={backend}", f"data.source={tmp_path}/corpus", f"run.dir={tmp_path}/run",
             f"data.cache={tmp_path}/cache", "log.progress=off"]  # fmt: skip
    ended = subprocess.run([sys.executable, "-m", "bagualu.launch.cli", *words], capture_output=True, text=True, cwd=tmp_path,
                           env=leftovers.environment)  # fmt: skip
    begun, refused = ended.stderr.splitlines()
    assert (ended.returncode, begun.split(":")[0]) == (2, "tiny_dense")
    assert refused.startswith("bagualu: error: the text of data.source=")

"""`bagualu rehearse` and a request to stop: it counts between its two runs too."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from bagualu.trainer.process.stop_request import STOP_SIGNALS
from tests.launch.survival import SMALL

pytestmark = [pytest.mark.skipif(sys.platform != "linux", reason="reads /proc"), pytest.mark.timeout(300)]
ROOT = Path(__file__).parents[3]
WORDS = ["parallel.data=1", "train.steps=3", "checkpoint.every=2", "faults=[nan@step=2]", "log.progress=off"]
STOPPED_BETWEEN = """
import os, signal, sys
from bagualu.launch.verbs import rehearse
from bagualu.launch.cli import main
signal.signal(signal.SIGINT, signal.default_int_handler)

def run_after_signal(recipe, *arguments, **named):
    if not recipe.faults:  # before the second run
        os.kill(os.getpid(), signal.{signal})
    return run(recipe, *arguments, **named)

run, rehearse.run = rehearse.run, run_after_signal
sys.exit(main())
"""


@pytest.mark.parametrize(("backend", "signal"), [("gloo", "SIGTERM"), ("simulated", "SIGINT")])
def test_a_request_to_stop_between_the_runs_ends_it_before_the_second_one(tmp_path, leftovers, backend, signal):
    assert signal in [number.name for number in STOP_SIGNALS]
    words = ["rehearse", *SMALL, *WORDS, f"comm.backend={backend}", f"run.dir={tmp_path}/run", "--json"]
    command = [sys.executable, "-c", STOPPED_BETWEEN.format(signal=signal), *words]
    done = subprocess.run(command, cwd=ROOT, env=leftovers.environment, capture_output=True, text=True)
    assert done.returncode == 75, done.stderr
    assert done.stderr.splitlines()[-1].startswith("bagualu: stopped: asked to stop before anything was trained; ")
    assert json.loads(done.stdout)["ended"] == "stopped"
    folder = tmp_path / "run-rehearsal"
    assert json.loads((folder / "rehearsed" / "summary.json").read_text())["ended"] == "done"
    assert not (folder / "uninterrupted" / "metrics.jsonl").exists()

"""Ctrl-C before a request to stop is listened to: one line, whatever Python is importing, and a code of its own."""

import json
import subprocess
import sys

import pytest

# The command as its script on the PATH starts it, with a Ctrl-C the moment a module begins to be imported.
COMMAND = """
import signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)

class Interrupting:
    def find_spec(self, name, path, target=None):
        if name == '{}':
            sys.meta_path.remove(self)
            signal.raise_signal(signal.SIGINT)

sys.meta_path.insert(0, Interrupting())
from bagualu.launch.cli import main
sys.exit(main())
"""
EARLY = ["bagualu.comm.errors", "bagualu.launch.verbs.usage", "bagualu.launch.verbs.train", "hydra"]


def command(tmp_path, leftovers, module, *words):
    return subprocess.run(
        [sys.executable, "-c", COMMAND.format(module), "train", "recipe=tiny", "train.steps=2", f"run.dir={tmp_path}/run", *words],
        capture_output=True, text=True, env=leftovers.environment,
    )  # fmt: skip


@pytest.mark.parametrize("module", EARLY)
def test_ctrl_c_before_the_recipe_is_checked_is_one_line_and_code_130(tmp_path, leftovers, module):
    done = command(tmp_path, leftovers, module, "--json")
    assert (done.returncode, done.stderr) == (130, "bagualu: interrupted by Ctrl-C\n")
    assert json.loads(done.stdout) == {"ended": "interrupted"}
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("backend", ["gloo", "simulated"])
def test_ctrl_c_while_torch_is_imported_stops_it_with_nothing_done(tmp_path, leftovers, backend):
    done = command(tmp_path, leftovers, "torch", f"comm.backend={backend}")
    assert done.returncode == 75, done.stderr
    assert "Traceback" not in done.stderr
    assert done.stderr.splitlines()[-1].endswith("start again with checkpoint.resume=true")

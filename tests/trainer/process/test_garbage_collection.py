"""Python's garbage collector is off while torch is imported for the first time, and afterwards as it was before."""

import gc
import subprocess
import sys
from pathlib import Path

import pytest

from bagualu.trainer.process.garbage_collection import uncollected

ROOT = Path(__file__).parents[3]
FIRST = """
import gc
from bagualu.trainer.process.garbage_collection import uncollected
runs = []
gc.callbacks.append(lambda phase, info: runs.append(phase))
try:
    with uncollected():
        import torch
        {}
except KeyError:
    pass
print(len(runs), gc.isenabled(), gc.get_freeze_count() > 100_000)
"""


@pytest.mark.parametrize("then", ["", "raise KeyError"])
def test_the_collector_waits_for_the_import_and_then_leaves_torch_out(then: str) -> None:
    done = subprocess.run([sys.executable, "-c", FIRST.format(then)], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["0", "True", "True"]


def test_where_torch_is_there_nothing_changes() -> None:
    before = gc.get_freeze_count()
    with uncollected():
        assert gc.isenabled()
    assert gc.get_freeze_count() <= before  # some of those that were frozen before may have ended


def test_a_collector_that_was_off_stays_off() -> None:
    script = "import gc; gc.disable()\nfrom bagualu.trainer.process.garbage_collection import uncollected\n"
    script += "with uncollected(): import torch\n"
    script += "print(gc.isenabled(), gc.get_freeze_count())"
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "0"]

"""Ranks on machines of their own, and a network between them that delays, loses, garbles, breaks off: never a wrong sum.

What TCP can make good again changes nothing; what it cannot ends every rank with the collective that failed.
"""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.comm.behind_wire import FAIR_STEPS, RANKS, STEPS
from tests.wire import why_not

NONE = why_not()
pytestmark = pytest.mark.skipif(bool(NONE), reason=f"needs network namespaces, as root or unprivileged: {NONE}")
ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def lived(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("weathers")
    command = ["unshare", "-rn", sys.executable, "-m", "tests.comm.behind_wire", str(folder)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    return {path.stem: json.loads(path.read_text()) for path in folder.glob("*.json")}


@pytest.mark.parametrize("weather", ["delay", "loss", "garble", "gap"])
def test_what_is_sent_again_changes_nothing(lived: dict[str, Any], weather: str) -> None:
    did = lived[weather]
    assert did["why"] == [""] * RANKS
    assert did["steps"] == [STEPS] * RANKS
    assert did["touched"] > 0


@pytest.mark.parametrize("weather", ["reset", "dead", "one_way"])
def test_what_cannot_be_made_good_is_a_named_failure_on_every_rank_and_no_wrong_sum(lived: dict[str, Any], weather: str) -> None:
    did = lived[weather]
    assert did["touched"] > 0
    for why, steps in zip(did["why"], did["steps"], strict=True):
        assert FAIR_STEPS <= steps < STEPS
        assert " in group " in why, why
        assert " of ranks [" in why, why
        assert " failed: " in why, why

"""A link between two machines is lost: found long before the collective's own timeout, and the rank that is cut off is named."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.wire import why_not

NONE = why_not()
ROOT = Path(__file__).parents[3]
pytestmark = [pytest.mark.skipif(bool(NONE), reason=f"no network namespaces here: {NONE}"), pytest.mark.timeout(300)]


@pytest.mark.parametrize("how", ["both", "one_way"])
def test_the_rank_behind_the_lost_link_is_named(tmp_path: Path, how: str) -> None:
    command = ["unshare", "-rn", sys.executable, "-m", "tests.fault_tolerance.watchdog.cut_link", str(tmp_path), how]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    failure = json.loads(done.stdout.splitlines()[-1])
    report = Path(failure["cause"].rsplit("report: ", 1)[1]).read_text()
    assert failure["rank"] == 3, report
    assert "not acknowledged" in failure["cause"]
    assert "10.77.0.2" in report
    assert "not acknowledged" in report

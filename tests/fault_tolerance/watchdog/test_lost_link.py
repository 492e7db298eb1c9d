"""A link between two machines is lost: found long before the collective's own timeout, and the rank that is cut off is named."""

import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.wire import why_not

NONE = why_not()
ROOT = Path(__file__).parents[3]
pytestmark = [pytest.mark.skipif(bool(NONE), reason=f"no network namespaces here: {NONE}"), pytest.mark.timeout(300)]


WAYS = ("both", "one_way")


@pytest.fixture(scope="module")
def scripts(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, subprocess.Popen[str]]]:
    """Runs the script once for each way in which the link is lost, both at the same time, since they mostly wait. Yields their
    processes by the name of the way."""
    with ExitStack() as stack:
        started = {}
        for how in WAYS:
            folder = str(tmp_path_factory.mktemp(how))
            command = ["unshare", "-rn", sys.executable, "-m", "tests.fault_tolerance.watchdog.cut_link", folder, how]
            pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
            started[how] = stack.enter_context(subprocess.Popen(command, cwd=ROOT, text=True, **pipes))
            stack.callback(started[how].kill)
        yield started


@pytest.mark.parametrize("how", WAYS)
def test_the_rank_behind_the_lost_link_is_named(scripts: dict[str, subprocess.Popen[str]], how: str) -> None:
    out, err = scripts[how].communicate()
    assert scripts[how].returncode == 0, err
    failure = json.loads(out.splitlines()[-1])
    report = Path(failure["cause"].rsplit("report: ", 1)[1]).read_text()
    assert failure["rank"] == 3, report
    assert "not acknowledged" in failure["cause"]
    assert "10.77.0.2" in report
    assert "not acknowledged" in report

"""Launchers that are forked are as if they had been started: their files, session, environment, and that they are found again."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.launch.warm import Forked, Launcher, fork_from_here, run_as_root
from tests.leftovers import Leftovers
from tests.wire import why_not

NONE = why_not()
pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
PROBE = "tests.launch.test_warm"


def main(entrypoint: str) -> int:
    """What is run in place of a launcher."""
    files = {
        file: os.readlink(f"/proc/self/fd/{file}")
        for file in os.listdir("/proc/self/fd")
        if os.path.exists(f"/proc/self/fd/{file}")
    }
    print(json.dumps({
        "files": files, "session": os.getsid(0), "parent": os.getppid(), "words": sys.argv[1:], "folder": os.getcwd(),
        "environment": dict(os.environ), "entrypoint": entrypoint,
    }))  # fmt: skip
    return 7


CHILD = "import json, os, sys; print(json.dumps([os.getppid(), os.readlink('/proc/self/ns/net'), sys.argv[1:]])); {}"


def script(*words: str) -> None:
    """What is run in a network of its own: starts processes there."""
    fork_from_here()
    told = []
    for end in ("sys.exit(7)", "raise ValueError", "pass"):
        with Forked(CHILD.format(end), words, cwd=Path.cwd(), env=os.environ) as child:
            out, err = child.communicate()
            told.append([json.loads(out), child.returncode, err.count("ValueError")])
    print(json.dumps([os.getpid(), os.geteuid(), os.readlink("/proc/self/ns/net"), told]))


@pytest.mark.skipif(bool(NONE), reason=f"needs network namespaces, as root or unprivileged: {NONE}")
def test_a_program_is_root_of_its_network_and_what_it_forks_is_there_too(leftovers: Leftovers) -> None:
    done = run_as_root(PROBE, ["a", "b c"], "network", leftovers.environment)
    assert done.returncode == 0, done.stderr
    pid, user, network, told = json.loads(done.stdout)
    assert user == 0
    assert network != os.readlink("/proc/self/ns/net")
    assert told == [[[pid, network, ["a", "b c"]], *ended] for ended in ([7, 0], [1, 1], [0, 0])]


def test_it_has_what_it_would_have(tmp_path: Path, leftovers: Leftovers) -> None:
    environment = {**leftovers.environment, "PYTHONPATH": str(Path(__file__).parents[2])}
    with Launcher(["a", "b c"], "x:y", PROBE, cwd=tmp_path, env=environment) as launcher:
        out, err = launcher.communicate()
    assert launcher.returncode == 7, err
    told = json.loads(out)
    assert (told["session"], told["parent"]) == (launcher.pid, os.getpid())
    assert (told["words"], told["folder"], told["entrypoint"]) == (["a", "b c"], str(tmp_path), "x:y")
    assert told["environment"] == environment
    assert [link for file, link in told["files"].items() if int(file) > 2] == [f"/memfd:{leftovers.mark} (deleted)"]


def test_all_its_processes_are_found_while_they_are_there(start, gone, leftovers: Leftovers) -> None:
    run = start()
    ranks = run.started()
    family = {run.process.pid, ranks[0]["parent"], *(rank["pid"] for rank in ranks)}
    assert family <= set(leftovers.pids())
    subprocess.run(["kill", "-9", str(run.process.pid)], check=True)
    assert gone(list(family))
    leftovers.assert_none()

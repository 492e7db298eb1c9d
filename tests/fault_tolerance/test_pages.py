"""The page that says where each of the thirty faults is tested says so of tests that are there."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs/design/fault_tolerance.md"


def test_each_of_the_thirty_faults_has_tests(request: pytest.FixtureRequest) -> None:
    _, table = PAGE.read_text().split("## Where it is shown\n")
    rows = re.findall(r"^\| (\d*) ?\| ([^|]+) \| ([^|]+) \|$", table.split("\n## ")[0], re.MULTILINE)[1:]  # without the head
    assert [int(number) for number, *_ in rows if number] == list(range(1, 31))
    modules = set()
    for number, what, files in rows:
        named = re.findall(r"`([^`]+)`", files)
        assert named, (number, what)
        for name in named:
            assert re.match(r"tests/\S*/test_\w+\.py$", name), name
            modules.add(name)
    modules -= {item.nodeid.split("::")[0] for item in request.session.items}  # this very run has them
    if not modules:
        return
    collect = [sys.executable, "-m", "pytest", "--collect-only", "-q", "-p", "no:cacheprovider", *sorted(modules)]
    plain = {key: value for key, value in os.environ.items() if key != "PYTEST_ADDOPTS"}
    done = subprocess.run(collect, cwd=ROOT, env=plain, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout  # one that cannot be imported tests nothing
    assert {name for name in modules if f"{name}:" not in done.stdout} == set()

"""The page that says where each of the thirty faults is tested says so of tests that are there."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs/design/fault_tolerance.md"


def test_each_of_the_thirty_faults_has_tests() -> None:
    _, table = PAGE.read_text().split("## Where it is shown\n")
    rows = re.findall(r"^\| (\d*) ?\| ([^|]+) \| ([^|]+) \|$", table.split("\n## ")[0], re.MULTILINE)[1:]  # without the head
    assert [int(number) for number, *_ in rows if number] == list(range(1, 31))
    for number, what, files in rows:
        named = re.findall(r"`([^`]+)`", files)
        assert named, (number, what)
        for name in named:
            assert re.match(r"tests/\S*/test_\w+\.py$", name), name
            assert "def test_" in (ROOT / name).read_text(), name

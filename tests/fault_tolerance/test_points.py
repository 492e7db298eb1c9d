"""The list of points is that of the points that are passed, no more and no less."""

import ast
from pathlib import Path

from bagualu.fault_tolerance.ledger.totals import PHASES
from bagualu.fault_tolerance.points import POINTS

ROOT = Path(__file__).parents[2]


def test_points_are_those_that_the_sources_pass() -> None:
    passed = set()
    for folder in ("parallel", "fault_tolerance", "trainer", "launch"):
        for path in (ROOT / folder).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.Call) and ast.unparse(node.func).endswith("monitor.at"):
                    (argument,) = node.args
                    assert isinstance(argument, ast.Constant), f"{path}: a point is named where it is passed"
                    passed.add(argument.value)
    assert passed == set(POINTS), "list a new point in fault_tolerance/points.py, with the phase that it begins"


def test_every_phase_has_its_place_in_the_ledger() -> None:
    assert set(POINTS.values()) <= {*PHASES, "discarded"}

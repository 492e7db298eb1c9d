"""Coefficients of products are found again from times that were made with them, and tables are written into cluster files."""

import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import yaml

sys.path.insert(0, str(Path(__file__).parent))  # the benchmarks are programs, not an installed package

from published.fit import Measured, Part, Values, fit, seconds
from published.table import with_tables

from bagualu.comm.cluster_file import load_cluster, read_cluster
from bagualu.comm.topology import Chip, ShapeEfficiency
from bagualu.parallel.simulation.events import Operator, TensorType
from bagualu.parallel.simulation.operator_cost import operator_seconds

TRUE = Values({"half": np.array([1.4, 90.0])}, 4e-5)
GROUPS = {"float16": "half", "bfloat16": "half"}
SHAPES = [(m, n, k) for m in (1024, 4096, 16384) for n in (1024, 5120) for k in (64, 512, 4096)]


@pytest.fixture
def chip() -> Chip:
    return load_cluster("a100").parts[0].chip


def product(m: int, n: int, k: int) -> Operator:
    shapes = TensorType("float16", (m, k)), TensorType("float16", (k, n))
    return Operator("aten.mm.default", shapes, (TensorType("float16", (m, n)),), 2 * (m * k + k * n), 2 * m * n, 2 * m * n * k)


def added(elements: int) -> Operator:
    tensor = TensorType("float16", (elements,))
    return Operator("aten.add.Tensor", (tensor, tensor), (tensor,), 4 * elements, 2 * elements, 0)


def runs(chip: Chip, values: Values) -> list[Measured]:
    """Runs of products, of other operators, of many small ones, and of ones so small that the host limits them."""
    parts = [Part(10.0, {product(*shape): 24, added(2**index): 48, added(64): 100}, 8) for index, shape in enumerate(SHAPES, 16)]
    parts += [Part(3.0, {added(2 ** (index + 22)): 500}, 0) for index in range(4)]
    parts += [Part(1.0, {product(16384, 16384, 4096): 4, added(128): 2000 * index}, 0) for index in range(1, 4)]
    parts += [Part(5.0, {added(1024): 900}, 100), Part(5.0, {product(128, 128, 128): 900}, 100)]
    found = [Measured(chip, 1.0, [part], rest_seconds=0.01) for part in parts]
    return [replace(run, seconds=float(time)) for run, time in zip(found, seconds(found, values, GROUPS), strict=True)]


def test_values_are_found_from_times_that_were_made_with_them(chip: Chip) -> None:
    start = Values({"half": np.array([1.2, 30.0])}, 5e-5)
    found = fit(runs(chip, TRUE), start, GROUPS, ["half"])
    assert found.products["half"] == pytest.approx(TRUE.products["half"], rel=0.03)
    assert found.dispatch_seconds == pytest.approx(TRUE.dispatch_seconds, rel=0.03)


def test_rows_that_nothing_explains_change_little(chip: Chip) -> None:
    true = runs(chip, TRUE)
    odd = [replace(run, seconds=run.seconds * (2.0 if index in (3, 9) else 1.0)) for index, run in enumerate(true)]
    off = seconds(true, fit(odd, TRUE, GROUPS, ["half"]), GROUPS) / np.array([run.seconds for run in true]) - 1
    assert np.median(np.abs(off)) < 0.02


def test_the_level_alone_is_found(chip: Chip) -> None:
    slower = replace(TRUE, products={"half": 1.3 * TRUE.products["half"]})
    large = [run for run in runs(chip, slower) if run.parts[0].calls == 8 and run.seconds > 0.5]
    assert fit(large, TRUE, GROUPS, [], ["half"]).products["half"] == pytest.approx(slower.products["half"], rel=0.03)


def test_coefficients_of_a_dtype_that_no_run_has_stay(chip: Chip) -> None:
    start = replace(TRUE, products={**TRUE.products, "float8": np.array([2.0, 10.0])})
    found = fit(runs(chip, TRUE), start, GROUPS, ["half"])
    assert (found.products["float8"] == start.products["float8"]).all()


def test_a_table_in_a_cluster_file_gives_operators_the_times_of_the_fit(chip: Chip) -> None:
    text = (Path(__file__).parents[2] / "recipes" / "cluster" / "a100.yaml").read_text()
    table = [ShapeEfficiency(8192, 8192, 64, 0.502), ShapeEfficiency(8192, 8192, 8192, 0.705)]
    once = with_tables(text, {"float16": table}, "a program")
    twice = with_tables(once, {"float16": table}, "a program")
    assert once == twice
    assert once.count("a program") == 1
    written = read_cluster(yaml.safe_load(once), "a100", "text").parts[0].chip
    assert written.efficiency == {"float16": tuple(table)}
    assert replace(written, efficiency=chip.efficiency) == chip
    assert operator_seconds(written, product(8192, 8192, 8192)) != operator_seconds(
        replace(chip, efficiency={}), product(8192, 8192, 8192)
    )

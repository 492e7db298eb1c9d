"""Times between and beyond measured sizes."""

from dataclasses import replace

import pytest

from bagualu.comm.cluster_file import load_cluster
from bagualu.comm.topology import OperatorTime
from bagualu.parallel.simulation.events import Operator, TensorType
from bagualu.parallel.simulation.measured_times import measured_seconds

ROWS = (
    OperatorTime("float32", 4e6, 8e-3),
    OperatorTime("float32", 1e4, 1e-6),
    OperatorTime("float32", 1e6, 1e-3),
    OperatorTime("bfloat16", 1e6, 5e-3),
)
CHIP = replace(load_cluster("h100").parts[0].chip, operators={"aten.silu.default": ROWS})


def silu(work: int, dtype: str = "float32", name: str = "aten.silu.default", flops: int = 0) -> Operator:
    return Operator(name, (TensorType(dtype, (work,)),), (), work // 2, work // 2, flops)


@pytest.mark.parametrize(
    ("operator", "seconds"),
    [
        (silu(10**6), 1e-3),
        (silu(2 * 10**6), 8e-3**0.5 * 1e-3**0.5),
        (silu(8 * 10**6), 16e-3),
        (silu(10), 1e-6),
        (silu(10**6, "bfloat16"), 5e-3),
        (silu(2 * 10**6, "bfloat16"), 10e-3),
        (silu(10, flops=10**6), 1e-3),
    ],
)
def test_a_time_follows_from_those_of_the_nearest_sizes(operator: Operator, seconds: float) -> None:
    assert measured_seconds(CHIP, operator) == pytest.approx(seconds)


def test_a_dtype_that_was_not_measured_takes_the_times_of_the_others() -> None:
    assert measured_seconds(CHIP, silu(4 * 10**6, "float64")) == pytest.approx(8e-3)


def test_an_operator_that_was_not_measured_has_no_time() -> None:
    assert measured_seconds(CHIP, silu(10**6, name="aten.gelu.default")) is None

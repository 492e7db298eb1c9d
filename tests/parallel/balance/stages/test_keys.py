"""Keys that cannot work, refused with ones that can."""

import math

import pytest

from bagualu.comm.errors import RecipeError
from bagualu.parallel.balance.stages.keys import memory_caps, validate_split
from bagualu.parallel.config import ParallelConfig
from bagualu.parallel.layout import StagePlacement


@pytest.mark.parametrize("balance", ["measured", "analytic"])
@pytest.mark.parametrize("speeds", [None, "measured", [1.0, 0.5], [1, 2], (0.3, 1.0)])
@pytest.mark.parametrize("memory", [None, 2**30, [2**30, 2**29]])
def test_what_makes_sense_is_taken(balance: str, speeds: object, memory: object) -> None:
    ParallelConfig(pipeline=2, balance=balance, speeds=speeds, memory_bytes=memory).validate()
    validate_split(balance, 2, StagePlacement(2), memory, "none")


@pytest.mark.parametrize(
    "speeds", ["fast", [1.0], [1.0, 0.0], [1.0, -1.0], [1.0, math.inf], [1.0, math.nan], 0.5, [1.0, "2"], [True, 1.0]]
)
def test_speeds_that_are_none_are_refused(speeds: object) -> None:
    with pytest.raises(RecipeError, match=r"for each of the parallel.pipeline=2 ranks, e.g. parallel.speeds=\[1.0,1.0\]"):
        ParallelConfig(pipeline=2, balance="measured", speeds=speeds).validate()


@pytest.mark.parametrize("balance", ["uniform", [1, 1]])
def test_speeds_that_nobody_asks_for_are_refused(balance: object) -> None:
    with pytest.raises(RecipeError, match=r"has no effect with .*; give parallel.balance=measured or leave parallel.speeds out"):
        ParallelConfig(pipeline=2, balance=balance, speeds=[1.0, 0.5]).validate()


@pytest.mark.parametrize("memory", [0, -5, "8GB", [1], [1, 0], [1.5, 2.5], 1e9, [True, 1]])
def test_caps_that_are_none_are_refused(memory: object) -> None:
    with pytest.raises(RecipeError, match=r"or a list of 2, a number per pipeline rank; e.g. parallel.memory_bytes=8589934592"):
        ParallelConfig(pipeline=2, memory_bytes=memory).validate()


def test_one_cap_is_everybodys() -> None:
    assert memory_caps(7, 3) == [7, 7, 7]
    assert memory_caps([1, 2], 2) == [1, 2]
    assert memory_caps(None, 2) is None


@pytest.mark.parametrize(
    ("balance", "layers", "memory", "recompute", "message"),
    [
        ("measured", 3, None, "none", "parallel.pipeline=4 stages are more than model.layers=3; give parallel.pipeline=3 or less"),
        ([1, 2, 1], 4, None, "none", r"must hold 4 positive counts .*; e.g. parallel.balance=\[1,1,1,1\]"),
        ("best", 4, None, "none", "parallel.balance=best is unknown; give uniform, analytic, measured or a list of 4 layer counts"),
        ("analytic", 4, None, "auto", "give parallel.memory_bytes=BYTES, or train.recompute=none or full"),
    ],
)
def test_a_split_that_cannot_be_is_refused(balance: object, layers: int, memory: object, recompute: str, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        validate_split(balance, layers, StagePlacement(4), memory, recompute)

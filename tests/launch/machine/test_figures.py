"""Figures of several ranks become those of the mean rank, and survive JSON."""

import json
from dataclasses import replace

import pytest

from bagualu.launch.machine.figures import (
    LinkTime,
    OperatorSample,
    ProductTime,
    RankFigures,
    VariantTime,
    by_octave,
    of_all,
    rank_figures,
    usual,
)

ONE = RankFigures(
    2, "cpu", "Some CPU", 1, 10**10, 10**8,
    products=[ProductTime("bfloat16", 64, 64, 64, 1e-5), ProductTime("bfloat16", 512, 64, 64, 2e-5)],
    copy_bytes_per_second=1e10, launch_seconds=5e-6,
    operators=[OperatorSample("aten.silu.default", "bfloat16", 1000.0, 1e-4)],
    variants=[VariantTime("attention", name, "bfloat16", {"length": 64, "window": None}, seconds)
              for name, seconds in (("blocks", 2e-3), ("kernel", 1e-3))],
    links=[LinkTime("p2p", 1024, 2, 1e-4)], spread=0.1,
)  # fmt: skip


def test_figures_survive_json() -> None:
    assert rank_figures(json.loads(json.dumps(ONE.as_dict()))) == ONE


def test_the_peak_of_a_dtype_is_its_fastest_product() -> None:
    assert ONE.peaks() == {"bfloat16": pytest.approx(2 * 512 * 64 * 64 / 2e-5)}


def test_the_mean_rank_has_medians() -> None:
    slow = replace(ONE, products=[replace(one, seconds=3 * one.seconds) for one in ONE.products], memory_bytes=5, spread=0.5,
                   operators=[OperatorSample("aten.silu.default", "bfloat16", 1010.0, 3e-4)])  # fmt: skip
    mean = of_all([replace(ONE, cores=132), slow])
    assert mean.cores == 132
    assert [one.seconds for one in mean.products] == pytest.approx([2e-5, 4e-5])
    assert (mean.memory_bytes, mean.spread) == (5, 0.5)
    assert mean.operators == [OperatorSample("aten.silu.default", "bfloat16", 1005.0, pytest.approx(2e-4, rel=0.01))]


def test_the_usual_time_is_the_lower_quartile() -> None:
    assert [usual([3.0]), usual([4.0, 1.0]), usual(range(9))] == [3.0, 1.0, 2]


def test_samples_of_an_operator_are_joined_by_dtype_and_octave_of_work() -> None:
    samples = [OperatorSample(name, dtype, work, seconds) for name, dtype, work, seconds in (
        ("mul", "float32", 1024, 1024.0), ("mul", "float32", 2000, 4000.0), ("mul", "float32", 1500, 4500.0),
        ("mul", "float32", 2048, 4.0), ("mul", "bfloat16", 1024, 5.0), ("add", "float32", 0, 6.0),
    )]  # fmt: skip
    assert by_octave(samples) == [
        OperatorSample("add", "float32", 1.0, 6.0),
        OperatorSample("mul", "bfloat16", 1024, 5.0),
        OperatorSample("mul", "float32", 1500, 3000.0),
        OperatorSample("mul", "float32", 2048, 4.0),
    ]

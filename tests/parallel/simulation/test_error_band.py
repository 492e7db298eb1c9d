"""The band around a prediction is that of the held-out runs nearest to it."""

import pytest

from bagualu.parallel.simulation.error_band import HeldOutError, error_band, read_errors, write_errors

A100, H100 = "A100 SXM4 80GB", "H100 SXM5 80GB"
SMALL = [HeldOutError(A100, 8, 10**9, "dense", 0.01 * (index - 10)) for index in range(21)]
LARGE = [HeldOutError(A100, 512, 10**11, "dense", 0.25) for _ in range(20)]
MIXTURES = [HeldOutError(H100, 256, 10**11, "moe", -0.2) for _ in range(20)]
ALL = [*SMALL, *LARGE, *MIXTURES]


def test_the_band_is_that_of_the_nearest_runs() -> None:
    band = error_band(A100, 384, 2 * 10**11, "dense", ALL)
    assert band is not None
    assert not band.beyond
    assert (band.least, band.most) == (pytest.approx(0.8), pytest.approx(0.8))  # they were predicted a quarter too slow
    assert (band.chips, band.devices, band.rows) == ((A100,), (512, 512), 20)


def test_eight_of_ten_nearest_runs_lie_within_the_band() -> None:
    band = error_band(A100, 8, 10**9, "dense", SMALL)
    assert band is not None
    inside = [run for run in SMALL if band.least <= 1 / (1 + run.error) <= band.most]
    assert band.least < 1 < band.most
    assert 16 <= len(inside) <= 18


def test_a_mixture_takes_the_errors_of_mixtures() -> None:
    band = error_band(H100, 1024, 10**11, "moe", ALL)
    assert band is not None
    assert band.least == pytest.approx(1.25)


@pytest.mark.parametrize(("chip", "devices", "kind"), [(H100, 131072, "moe"), ("GB200 186GB", 256, "moe"), (H100, 256, "dense")])
def test_a_band_without_a_run_of_that_chip_kind_and_size_is_extrapolated(chip: str, devices: int, kind: str) -> None:
    band = error_band(chip, devices, 10**11, kind, ALL)
    assert band is not None
    assert band.beyond


def test_without_runs_there_is_no_band() -> None:
    assert error_band(H100, 8, 10**9, "dense", []) is None


def test_errors_are_read_as_they_were_written() -> None:
    assert read_errors(write_errors(ALL, "a program")) == ALL

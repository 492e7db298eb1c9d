"""The learning rate, step by step."""

import itertools
import math
import re
from dataclasses import replace
from pathlib import Path

import pytest

from bagualu.comm.errors import RecipeError
from bagualu.trainer.optim.config import OptimConfig
from bagualu.trainer.optim.schedule import learning_rate


def rates(steps: int, **changes: object) -> list[float]:
    config = OptimConfig(**{"lr": 1.0, "warmup_steps": 4, "final_lr_ratio": 0.1, **changes})  # type: ignore[arg-type]
    return [learning_rate(config, step, steps) for step in range(steps)]


@pytest.mark.parametrize("schedule", ["cosine", "wsd", "constant"])
def test_warmup_rises_in_even_parts_to_the_full_rate(schedule: str) -> None:
    assert rates(40, schedule=schedule)[:5] == pytest.approx([0.25, 0.5, 0.75, 1.0, 1.0])
    assert rates(40, schedule=schedule, warmup_steps=0)[0] == 1.0


def test_cosine_falls_from_the_full_rate_to_the_last_steps_ratio() -> None:
    found = rates(25, schedule="cosine")
    assert found[4] == 1.0
    assert found[14] == pytest.approx(0.1 + 0.9 / 2)  # half way between step 4 and step 24
    assert found[9] == pytest.approx(0.1 + 0.9 * (1 + math.cos(math.pi / 4)) / 2)
    assert found[24] == pytest.approx(0.1)
    assert all(a > b for a, b in itertools.pairwise(found[4:]))


def test_wsd_stays_and_then_falls_in_even_parts() -> None:
    found = rates(30, schedule="wsd", decay_fraction=0.2)
    assert found[3:24] == pytest.approx([1.0] * 21)
    assert found[23:] == pytest.approx([1 - 0.9 * k / 6 for k in range(7)])


def test_constant_stays() -> None:
    assert rates(30, schedule="constant")[3:] == [1.0] * 27


@pytest.mark.parametrize("schedule", ["cosine", "wsd", "constant"])
@pytest.mark.parametrize("steps", [1, 2, 3, 4, 5, 6])
def test_runs_about_as_short_as_the_warmup_have_rates(schedule: str, steps: int) -> None:
    found = rates(steps, schedule=schedule)
    assert found[:4] == pytest.approx([0.25, 0.5, 0.75, 1.0][:steps])
    assert all(0.1 - 1e-12 <= rate <= 1 for rate in found)


def test_without_a_decay_wsd_is_constant() -> None:
    assert rates(30, schedule="wsd", decay_fraction=0.0) == rates(30, schedule="constant")


def test_wsd_of_decay_alone_begins_below_the_full_rate() -> None:
    found = rates(30, schedule="wsd", decay_fraction=1.0, warmup_steps=0)
    assert found == pytest.approx([1 - 0.9 * (step + 1) / 30 for step in range(30)])


def test_steps_past_the_end_keep_the_last_rate() -> None:
    for schedule in ("cosine", "wsd"):
        config = OptimConfig(lr=1.0, warmup_steps=4, schedule=schedule)
        assert learning_rate(config, 40, 30) == pytest.approx(0.1)


@pytest.mark.parametrize("schedule", ["cosine", "wsd"])
@pytest.mark.parametrize("steps", [5, 6, 9, 30])
def test_a_final_ratio_of_zero_leaves_no_step_without_a_rate(schedule: str, steps: int) -> None:
    found = rates(steps, schedule=schedule, final_lr_ratio=0.0, decay_fraction=0.2)
    assert all(rate > 0 for rate in found)
    assert found[-1] < 1 or steps == 5
    config = OptimConfig(lr=1.0, warmup_steps=4, schedule=schedule, final_lr_ratio=0.0)
    assert learning_rate(config, steps, steps) == pytest.approx(0)


@pytest.mark.parametrize("fraction", [0.0, 0.05, 0.2, 0.5, 1.0])
def test_wsd_falls_in_even_parts_wherever_it_is_not_refused(fraction: float) -> None:
    for steps, warmup in itertools.product(range(1, 40), (0, 1, 4, 20)):
        config = OptimConfig(lr=1.0, schedule="wsd", warmup_steps=warmup, decay_fraction=fraction, final_lr_ratio=0.1)
        try:
            config.validate_steps(steps)
        except RecipeError as refused:
            assert warmup + round(fraction * steps) > steps
            fix = int(re.findall(r"give optim\.warmup_steps=(\d+)", str(refused))[0])
            replace(config, warmup_steps=fix).validate_steps(steps)
            continue
        found = [learning_rate(config, step, steps) for step in range(steps)]
        falls = [before - after for before, after in itertools.pairwise(found) if after < before]
        assert falls == pytest.approx([0.9 / max(1, config.decay_steps(steps))] * len(falls))


def drawn(config: OptimConfig, steps: int) -> str:
    """The curve in tenths of the full rate, the highest tenth first."""
    tenths = [round(10 * learning_rate(config, step, steps) / config.lr) for step in range(steps)]
    rows = ["".join("#" if tenth >= level else " " for tenth in tenths) for level in range(10, 0, -1)]
    return "".join(f"    {row}".rstrip() + "\n" for row in rows)


def test_the_page_draws_the_curves() -> None:
    page = (Path(__file__).parents[3] / "docs/guides/learning_rate.md").read_text(encoding="utf-8")
    for schedule in ("cosine", "wsd", "constant"):
        assert f"`{schedule}`\n\n{drawn(OptimConfig(schedule=schedule, warmup_steps=5), 30)}" in page

"""The learning rate, step by step."""

import itertools
import math

import pytest

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


def test_wsd_of_decay_alone_does_not_jump_after_the_warmup() -> None:
    found = rates(30, schedule="wsd", decay_fraction=1.0)
    assert max(abs(a - b) for a, b in itertools.pairwise(found)) <= 0.25 + 1e-12
    assert found[-1] == pytest.approx(0.1)


def test_steps_past_the_end_keep_the_last_rate() -> None:
    for schedule in ("cosine", "wsd"):
        config = OptimConfig(lr=1.0, warmup_steps=4, schedule=schedule)
        assert learning_rate(config, 40, 30) == pytest.approx(0.1)

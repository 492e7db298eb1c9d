"""What is said of the learning rate, and what is proposed after a run."""

import json
from pathlib import Path

import pytest

from bagualu.trainer.optim.config import OptimConfig
from bagualu.trainer.optim.schedule import learning_rate
from bagualu.trainer.output.progress import next_commands
from bagualu.trainer.output.rate import remarks
from bagualu.trainer.recipe.compose import compose, save_recipe
from bagualu.trainer.recipe.config import Recipe
from tests.parity import small_recipe


def recipe_in(folder: Path, done: int, before: int, now: int, **optim: object) -> Recipe:
    """A recipe for `now` steps after a run of `before` steps with the defaults has done `done`."""
    recipe = small_recipe(run__dir=str(folder), train__steps=now)
    recipe.optim = OptimConfig(**{"warmup_steps": 5, **optim})  # type: ignore[arg-type]
    was = OptimConfig(warmup_steps=5, schedule=recipe.optim.schedule)
    lines = [json.dumps({"step": step, "lr": learning_rate(was, step - 1, before)}) for step in range(1, done + 1)]
    (folder / "metrics.jsonl").write_text("\n".join([*lines, '{"step": ', ""]))
    return recipe


def test_a_rate_that_jumps_when_the_run_goes_on_is_said_with_both_rates(tmp_path: Path) -> None:
    (line,) = remarks(recipe_in(tmp_path, 30, 30, 60), 30)
    assert "step 30 had 0.0001, step 31 has 0.000602, 6.02 times as much" in line
    assert "train.steps=60 is not the curve that the run was on" in line


@pytest.mark.parametrize(
    ("schedule", "done", "before", "now", "changes"),
    [
        ("cosine", 20, 30, 30, {}),
        ("cosine", 3, 30, 60, {}),  # in the warmup
        ("constant", 30, 30, 60, {}),
        ("wsd", 15, 30, 60, {}),  # in the stable part
        ("cosine", 30, 30, 60, {"schedule": "wsd", "lr": 1e-4}),
        ("cosine", 0, 30, 60, {}),
        ("cosine", 30, 30, 30, {}),
    ],
)
def test_a_rate_that_does_not_jump_is_not_talked_about(
    tmp_path: Path, schedule: str, done: int, before: int, now: int, changes: dict[str, object]
) -> None:
    recipe = recipe_in(tmp_path, done, before, now, schedule=schedule)
    recipe.optim = OptimConfig(**{"warmup_steps": 5, "schedule": schedule, **changes})  # type: ignore[arg-type]
    assert remarks(recipe, done) == []


@pytest.mark.parametrize("optim", [{"lr": 2e-3}, {"warmup_steps": 25}, {"final_lr_ratio": 1.0}])
def test_a_rate_that_jumps_for_another_key_is_said_too(tmp_path: Path, optim: dict[str, object]) -> None:
    (line,) = remarks(recipe_in(tmp_path, 20, 30, 30, **optim), 20)
    assert line.startswith("learning rate: step 20 had ")


def test_without_a_record_nothing_is_said(tmp_path: Path) -> None:
    recipe = recipe_in(tmp_path, 30, 30, 60)
    for text in ("", "[]\n3\n", '{"step": 30}\n', '{"step": 30, "lr": NaN}\n'):
        (tmp_path / "metrics.jsonl").write_text(text)
        assert remarks(recipe, 30) == []
    (tmp_path / "metrics.jsonl").unlink()
    assert remarks(recipe, 30) == []


@pytest.mark.parametrize(("warmup", "said"), [(29, None), (30, "only in the last step"), (40, "never reached: the last step")])
def test_a_warmup_that_takes_all_of_the_run_is_said(tmp_path: Path, warmup: int, said: str | None) -> None:
    found = remarks(recipe_in(tmp_path, 0, 30, 30, warmup_steps=warmup), 0)
    assert (found == []) if said is None else (len(found) == 1 and said in found[0])


OPTIMS = [
    [],
    ["optim.warmup_steps=5"],
    ["optim.schedule=wsd", "optim.warmup_steps=5"],
    ["optim.schedule=wsd", "optim.warmup_steps=0", "optim.decay_fraction=1.0"],
    ["optim.schedule=wsd", "optim.warmup_steps=14", "optim.decay_fraction=0.5"],
    ["optim.schedule=constant"],
    ["optim.lr=3e-4", "optim.final_lr_ratio=0.5"],
    ["optim.warmup_steps=100"],
    ["optim.warmup_steps=30"],
]


@pytest.mark.parametrize("overrides", OPTIMS, ids=" ".join)
def test_the_command_to_train_on_is_valid_and_keeps_the_rate(tmp_path: Path, overrides: list[str]) -> None:
    first = compose(["recipe=tiny", *overrides, "train.steps=30", f"run.dir={tmp_path}/run"])
    save_recipe(first)
    _, (kind, command), _ = next_commands(first.run.dir, first.optim, 30, 30)
    assert kind in ("train on", "train on, rate kept")
    second = compose(command.split()[2:])
    second.validate(second.world_size())
    assert second.train.steps == 60
    before, after = learning_rate(first.optim, 29, 30), learning_rate(second.optim, 30, 60)
    in_the_warmup = first.optim.warmup_steps > 30
    assert after == pytest.approx(before, rel=0.1 if not in_the_warmup else 0.05)


def test_a_jump_that_cannot_be_avoided_stands_in_the_proposal() -> None:
    optim = compose(["recipe=tiny", "optim.final_lr_ratio=0", "train.steps=100"]).optim
    _, (kind, command), _ = next_commands("runs/tiny", optim, 100, 100)
    jump = learning_rate(optim, 100, 200) / learning_rate(optim, 99, 100)
    assert kind == f"train on, rate x {jump:.0f}"
    assert command == "bagualu train run.dir=runs/tiny checkpoint.resume=true train.steps=200"

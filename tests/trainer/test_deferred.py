"""Samples that stand out are deferred, not lost: they are learnt from later, exactly once, and a resumed run does the same."""

from pathlib import Path
from typing import Any

import pytest
import torch

from bagualu.trainer.recipe.config import Recipe
from tests.trainer.faults import Ending, Fault, assert_same_bits, gradient, left_out_steps
from tests.trainer.test_guard import SPIKED, Clean, Learnable, recipe_in, runs

BAD = Learnable.bad_step
LATE = BAD + 5
"""With a window of 4: the first step more than 4 after it."""


class Turned(Learnable):
    """From `bad_step` on all is of another kind: one other token over and over."""

    def batch(self, step: int, start: int, count: int) -> tuple[torch.Tensor, torch.Tensor]:
        tokens, labels = self._batches.batch(step, start, count)
        token = 7 if step + 1 < self.bad_step else 9
        tokens[:], labels[:] = token, token
        return tokens, labels


def recipe(folder: Path, layout: str = "data", **changes: Any) -> Recipe:
    # A gradient norm of a model that knows its data is next to nothing, and any change of it is a spike: here only the loss counts.
    return recipe_in(folder, layout, **{**SPIKED, "data__global_batch": 8, "train__steps": 24, "guard__spike_factor": 0, **changes})


def lines_of(endings: list[Ending], key: str) -> dict[int, Any]:
    return {line["step"]: line[key] for line in endings[0].lines if key in line}


@pytest.mark.parametrize(
    "layout", ["data", *(pytest.param(one, marks=pytest.mark.slow) for one in ("tensor", "pipeline")), "expert"]
)
def test_samples_that_stand_out_are_deferred_and_learnt_from_later(tmp_path: Path, layout: str) -> None:
    found = runs("simulated", recipe(tmp_path, layout), None, Learnable)
    assert found[0].error == ""
    assert (lines_of(found, "deferred"), lines_of(found, "deferred_step")) == ({BAD: True}, {LATE: BAD})
    assert lines_of(found, "discarded") == {BAD: True}
    assert (found[0].guard["skipped_steps"], left_out_steps(found)) == ([], 0)
    assert [line["step"] for line in found[0].lines] == list(range(1, 25))


def test_until_then_the_run_is_the_one_without_them(tmp_path: Path) -> None:
    found = runs("simulated", recipe(tmp_path / "found"), None, Learnable, LATE - 1)
    other = runs("simulated", recipe(tmp_path / "other", guard__leave_out=[BAD]), None, Clean, LATE - 1)
    assert_same_bits(found, other)
    assert (found[0].guard["skipped_steps"], left_out_steps(found), left_out_steps(other)) == ([BAD], 1, 1)


@pytest.mark.parametrize(
    "stops", [(BAD - 1, BAD + 2, LATE), *(pytest.param(one, marks=pytest.mark.slow) for one in ((BAD,), (LATE - 1,)))]
)
def test_a_resumed_run_uses_them_alike(tmp_path: Path, stops: tuple[int, ...]) -> None:
    straight = runs("simulated", recipe(tmp_path / "straight"), None, Learnable)
    pieces = recipe(tmp_path / "pieces")
    for stop_at in (*stops, None):
        found = runs("simulated", pieces, None, Learnable, stop_at)
        pieces.checkpoint.resume = True
    assert_same_bits(found, straight)
    assert left_out_steps(found) == 0


@pytest.mark.parametrize("last", [BAD, BAD + 1, BAD + 2])
def test_before_the_run_ends_they_are_learnt_from(tmp_path: Path, last: int) -> None:
    found = runs("simulated", recipe(tmp_path, train__steps=last), None, Learnable)
    assert found[0].error == ""
    assert (found[0].guard["skipped_steps"], left_out_steps(found)) == ([], 0)
    assert lines_of(found, "deferred_step") == ({BAD + 1: BAD} if last == BAD + 1 else {BAD + 2: BAD} if last > BAD else {})
    assert lines_of(found, "discarded") == ({BAD: True} if last > BAD else {}), "the samples of the last step have no later step"
    without = runs("simulated", recipe(tmp_path / "other", train__steps=last, guard__leave_out=[BAD]), None, Clean)
    with pytest.raises(AssertionError):
        assert_same_bits(found, without)


def test_another_kind_of_text_costs_no_sample(tmp_path: Path) -> None:
    found = runs("simulated", recipe(tmp_path), None, Turned)
    assert found[0].error == ""
    assert len(lines_of(found, "deferred")) <= 2
    assert lines_of(found, "deferred").keys() == set(lines_of(found, "deferred_step").values())
    assert left_out_steps(found) == 0


def test_a_fault_of_the_hardware_while_they_are_computed_later_leaves_no_trace(tmp_path: Path) -> None:
    straight = runs("simulated", recipe(tmp_path / "straight"), None, Learnable)
    fault = gradient("nan", step=LATE)
    found = runs("simulated", recipe(tmp_path / "found"), fault, Learnable)
    assert_same_bits(found, straight)
    assert left_out_steps(found) == 0


@pytest.mark.parametrize("policy", ["skip", "rollback"])
def test_a_policy_that_leaves_out_still_does(tmp_path: Path, policy: str) -> None:
    found = runs("simulated", recipe(tmp_path, guard__on_spike=policy), None, Learnable)
    assert (found[0].guard["skipped_steps"], left_out_steps(found)) == ([BAD], 1)
    assert lines_of(found, "deferred_step") == {}


def test_weights_that_diverged_are_not_taken_for_another_kind_of_text(tmp_path: Path) -> None:
    """All weights of the last layers are scaled between two checks: every sample looks wrong from then on, those learnt too."""
    fault = Fault("weight", "scramble", step=BAD, rank=1, point="optimizer")
    changes = {"guard__check_every": 0, "guard__loss_spike_factor": 1.5}
    found = runs("simulated", recipe(tmp_path / "found", **changes), fault, Clean)
    assert found[0].error == ""
    assert found[0].guard["rolled_back"] == 1
    assert_same_bits(found, runs("simulated", recipe(tmp_path / "straight", **changes), None, Clean))

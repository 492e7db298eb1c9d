"""Policy by policy, what is done about a step."""

import json

import pytest

from bagualu.comm.errors import RecipeError
from bagualu.fault_tolerance.config import GuardConfig
from bagualu.fault_tolerance.guard.decide import MOST_ATTEMPTS, Situation, decide
from bagualu.fault_tolerance.guard.finite import after_update
from bagualu.fault_tolerance.guard.history import Memory
from bagualu.fault_tolerance.guard.verdict import Cause, GuardAction, GuardDecision

FIGURES = (Cause.NONFINITE, Cause.NORM, Cause.LOSS)
DAMAGES = (Cause.STATE, Cause.WEIGHTS)


def config(policy: str, **changes: int) -> GuardConfig:
    return GuardConfig(on_nonfinite=policy, on_spike=policy, on_disagreement=policy, **changes)


def test_nothing_wrong_commits() -> None:
    assert decide(config("stop"), Situation(None, 1, None)) is GuardAction.COMMIT


def test_an_overflow_is_skipped_whatever_the_policy_and_however_often() -> None:
    assert decide(config("stop", limit=0), Situation(Cause.OVERFLOW, 1, None, setbacks=40)) is GuardAction.SKIP


@pytest.mark.parametrize("policy", ["skip", "rollback", "stop"])
@pytest.mark.parametrize("cause", FIGURES)
def test_a_policy_that_needs_no_second_look_is_followed_at_once(policy: str, cause: Cause) -> None:
    assert decide(config(policy), Situation(cause, 1, None)) is GuardAction(policy)


@pytest.mark.parametrize("cause", FIGURES)
def test_retry_is_a_ladder(cause: Cause) -> None:
    retry = config("retry")
    assert decide(retry, Situation(cause, 1, False)) is GuardAction.RETRY
    assert decide(retry, Situation(cause, 2, True)) is GuardAction.SKIP, "the same bits: the data or the code"
    assert decide(retry, Situation(cause, 2, None)) is GuardAction.SKIP, "not known whether the same"
    assert decide(retry, Situation(cause, 2, False)) is GuardAction.RETRY, "other bits: the hardware, once more"
    assert decide(retry, Situation(cause, MOST_ATTEMPTS, False)) is GuardAction.STOP


@pytest.mark.parametrize("cause", DAMAGES)
def test_damage_is_repaired_where_it_can_be_and_else_taken_back(cause: Cause) -> None:
    retry = config("retry")
    assert decide(retry, Situation(cause, 1, False, repairable=True)) is GuardAction.RETRY
    assert decide(retry, Situation(cause, 1, False, repairable=False)) is GuardAction.ROLLBACK
    assert decide(retry, Situation(cause, MOST_ATTEMPTS, False, repairable=True)) is GuardAction.ROLLBACK
    assert decide(config("stop"), Situation(cause, 1, False)) is GuardAction.STOP


def test_gradients_that_are_never_the_same_end_the_run() -> None:
    actions = [decide(config("retry"), Situation(Cause.GRADIENTS, n, False)) for n in range(2, MOST_ATTEMPTS + 1)]
    assert actions == [GuardAction.RETRY] * (MOST_ATTEMPTS - 2) + [GuardAction.STOP]


@pytest.mark.parametrize("policy", ["skip", "rollback"])
def test_setbacks_in_a_row_come_to_an_end(policy: str) -> None:
    limited = config(policy, limit=3)
    actions = [decide(limited, Situation(Cause.NORM, 1, None, setbacks=n)) for n in range(5)]
    assert actions == [GuardAction(policy)] * 3 + [GuardAction.STOP] * 2


def test_setbacks_are_counted_until_the_run_gets_further_than_ever() -> None:
    memory = Memory.empty(GuardConfig())
    for step in (4, 5):
        memory.learn(step, 1.0, 1.0, GuardDecision(GuardAction.SKIP, Cause.NORM))
    assert memory.setbacks == 2
    memory.learn(9, 1.0, 1.0, GuardDecision(GuardAction.ROLLBACK, Cause.NORM))
    assert memory.setbacks == 3
    memory.learn(7, 1.0, 1.0, GuardDecision(GuardAction.COMMIT))
    assert memory.setbacks == 3, "a step done before, done again"
    memory.learn(10, 1.0, 1.0, GuardDecision(GuardAction.COMMIT))
    assert memory.setbacks == 0
    assert memory.left_out == {4: str(Cause.NORM), 5: str(Cause.NORM)}


def test_memory_survives_a_checkpoint() -> None:
    memory = Memory.empty(GuardConfig(leave_out=[3]))
    memory.learn(1, 1.5, 0.5, GuardDecision(GuardAction.COMMIT, attempts=2))
    memory.learn(2, 9.0, 9.0, GuardDecision(GuardAction.SKIP, Cause.LOSS))
    again = Memory.empty(GuardConfig(leave_out=[8]))
    again.load(memory.as_json())
    assert again.left_out == {2: "loss spike", 3: "guard.leave_out", 8: "guard.leave_out"}
    again.left_out.pop(8)
    assert again == memory


@pytest.mark.parametrize(
    ("key", "value", "fix"),
    [("on_spike", "ignore", "give one of retry, skip, rollback, stop"), ("on_disagreement", "skip", "one of retry, rollback, stop"),
     ("spike_factor", 1.0, "above 1, or 0"), ("loss_spike_factor", -2.0, "above 1, or 0"), ("limit", -1, "at least 0"),
     ("spike_window", 3, "at least 4"), ("check_every", -1, "at least 0"), ("rollback_window", 0, "at least 1"),
     ("leave_out", [0], "from 1")],
)  # fmt: skip
def test_a_wrong_value_is_refused_with_the_fix(key: str, value: object, fix: str) -> None:
    wrong = GuardConfig(**{key: value})  # type: ignore[arg-type]
    with pytest.raises(RecipeError, match=rf"guard\.{key}=.*{fix}"):
        wrong.validate(saves=True, repeatable=True)


def test_a_rollback_needs_checkpoints() -> None:
    for name in ("on_nonfinite", "on_spike", "on_disagreement"):
        with pytest.raises(RecipeError, match=rf"guard\.{name}=rollback needs checkpoints.*checkpoint\.every"):
            GuardConfig(**{name: "rollback"}).validate(saves=False, repeatable=True)
    GuardConfig(on_spike="rollback").validate(saves=True, repeatable=True)
    GuardConfig().validate(saves=False, repeatable=True)


DEFERRED = GuardDecision(GuardAction.SKIP, Cause.LOSS, attempts=2, deferred=True)


def learnt(steps: int, loss: float = 0.02) -> Memory:
    memory = Memory.empty(GuardConfig(spike_window=16))
    for step in range(1, steps + 1):
        memory.learn(step, loss, 1.0, GuardDecision(GuardAction.COMMIT))
    return memory


def test_samples_that_were_deferred_are_due_after_a_quarter_of_the_window_or_when_they_are_usual() -> None:
    memory = learnt(19)
    memory.learn(20, 8.0, 1.0, DEFERRED)
    assert [memory.due(step) for step in (21, 24, 25)] == [None, None, 20]
    assert (memory.left_out_steps(20), memory.left_out, memory.summary()["skipped_steps"]) == (1, {}, [20])
    memory.learn(21, 7.0, 1.0, DEFERRED)
    assert memory.spike(22, 7.0, 1.0) is None, "two in a row: another kind of text has begun"
    memory.learn(22, 7.0, 1.0, GuardDecision(GuardAction.COMMIT))
    assert memory.due(23) == 20
    memory.learn_late(20, 7.0, 1.0, GuardDecision(GuardAction.COMMIT), 23)
    assert memory.due(23) == 21
    memory.learn_late(21, 7.0, 1.0, GuardDecision(GuardAction.COMMIT), 23)
    assert (memory.due(99), memory.left_out_steps(99)) == (None, 0)


def test_samples_that_were_deferred_are_due_before_the_run_ends() -> None:
    memory = learnt(19)
    memory.learn(20, 8.0, 1.0, DEFERRED)
    assert [memory.due(21, last) for last in (20, 21, 22)] == [20, 20, None]
    memory.learn(21, 0.02, 1.0, GuardDecision(GuardAction.COMMIT))
    memory.learn(22, 9.0, 1.0, DEFERRED)
    assert [memory.due(23, last) for last in (23, 24, 25)] == [20, 20, None], "one of them fits into a step"


def test_weights_are_judged_by_samples_that_were_learnt_and_not_by_an_overflow_of_float16() -> None:
    memory, inf = learnt(19), float("inf")
    assert not memory.diverged(20, 0.02, 1.0)
    assert memory.diverged(20, 8.0, 1.0)
    assert memory.diverged(20, 0.02, 100.0)
    assert [memory.diverged(20, 0.02, inf, scale_can_fall) for scale_can_fall in (False, True)] == [True, False]
    assert memory.diverged(20, float("nan"), float("nan"), scale_can_fall=True)


def test_samples_that_are_never_finite_are_left_out_in_the_end() -> None:
    memory = learnt(19)
    memory.learn(20, 8.0, 1.0, DEFERRED)
    memory.learn_late(20, float("nan"), float("nan"), GuardDecision(GuardAction.SKIP, Cause.NONFINITE), 25)
    assert (memory.deferred, memory.left_out) == ({}, {20: str(Cause.NONFINITE)})
    assert memory.left_out_steps(20) == 1


def test_what_was_left_out_is_counted_up_to_the_step_that_the_run_has_come_to() -> None:
    memory = Memory.empty(GuardConfig(leave_out=[3, 50]))
    memory.learn(1, 1.0, 1.0, GuardDecision(GuardAction.SKIP, Cause.OVERFLOW))
    memory.learn(2, 1.0, 1.0, GuardDecision(GuardAction.SKIP, Cause.NONFINITE))
    assert memory.left_out_steps(10) == 3
    assert memory.left_out_steps(60) == 4


def test_memory_of_what_is_deferred_survives_a_checkpoint_and_an_older_one_has_none() -> None:
    memory = learnt(19)
    memory.learn(20, 8.0, 1.0, DEFERRED)
    saved = json.loads(json.dumps(memory.as_json()))
    assert Memory.is_one(saved)
    again = Memory.empty(GuardConfig(spike_window=16))
    again.load(saved)
    assert again == memory
    assert again.due(25) == 20
    old = {key: saved[key] for key in ("losses", "norms", "skipped_steps", "setbacks", "furthest", "counts")}
    assert Memory.is_one(old)
    for key, wrong in (("deferred_steps", {"20": 3}), ("hard_losses", [[1, -1.0]]), ("hard_row", "1"), ("newest", [1])):
        assert not Memory.is_one({**saved, key: wrong}), key


def test_after_a_return_to_a_checkpoint_what_is_left_out_is_not_deferred() -> None:
    memory, later = learnt(19), learnt(19)
    memory.learn(20, 8.0, 1.0, DEFERRED)
    later.leave_out(20, 22, "loss spike")
    memory.keep(later)
    assert (memory.deferred, memory.left_out) == ({}, dict.fromkeys((20, 21, 22), "loss spike"))


def test_deferred_samples_that_spoil_the_update_each_time_send_the_run_back_only_once() -> None:
    memory = learnt(19)
    memory.learn(20, 8.0, 1.0, DEFERRED)
    memory.learn_late(20, 8.0, 1.0, GuardDecision(GuardAction.ROLLBACK, Cause.UPDATE), 25)
    memory.learn(24, 0.02, 1.0, GuardDecision(GuardAction.COMMIT))
    assert memory.setbacks == 2, "step 24 was done before"
    again = memory.setbacks > 0 and memory.furthest >= 25
    assert after_update(GuardConfig(), False, again, memory.setbacks) is GuardAction.STOP


def test_deferred_samples_that_the_recipe_leaves_out_since_are_not_learnt_from_later() -> None:
    memory = learnt(19)
    memory.learn(20, 8.0, 1.0, DEFERRED)
    again = Memory.empty(GuardConfig(spike_window=16, leave_out=[20]))
    again.load(memory.as_json())
    assert (again.due(25), again.left_out_steps(25)) == (None, 1)

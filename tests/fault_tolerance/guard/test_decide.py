"""Policy by policy, what is done about a step."""

import pytest

from bagualu.comm.errors import RecipeError
from bagualu.fault_tolerance.config import GuardConfig
from bagualu.fault_tolerance.guard.decide import MOST_ATTEMPTS, Situation, decide
from bagualu.fault_tolerance.guard.memory import Memory
from bagualu.fault_tolerance.guard.verdict import Action, Cause, Verdict

FIGURES = (Cause.NONFINITE, Cause.NORM, Cause.LOSS)
DAMAGES = (Cause.STATE, Cause.WEIGHTS)


def config(policy: str, **changes: int) -> GuardConfig:
    return GuardConfig(on_nonfinite=policy, on_spike=policy, on_disagreement=policy, **changes)


def test_nothing_wrong_commits() -> None:
    assert decide(config("stop"), Situation(None, 1, None)) is Action.COMMIT


def test_an_overflow_is_skipped_whatever_the_policy_and_however_often() -> None:
    assert decide(config("stop", limit=0), Situation(Cause.OVERFLOW, 1, None, setbacks=40)) is Action.SKIP


@pytest.mark.parametrize("policy", ["skip", "rollback", "stop"])
@pytest.mark.parametrize("cause", FIGURES)
def test_a_policy_that_needs_no_second_look_is_followed_at_once(policy: str, cause: Cause) -> None:
    assert decide(config(policy), Situation(cause, 1, None)) is Action(policy)


@pytest.mark.parametrize("cause", FIGURES)
def test_retry_is_a_ladder(cause: Cause) -> None:
    retry = config("retry")
    assert decide(retry, Situation(cause, 1, False)) is Action.RETRY
    assert decide(retry, Situation(cause, 2, True)) is Action.SKIP, "the same bits: the data or the code"
    assert decide(retry, Situation(cause, 2, None)) is Action.SKIP, "not known whether the same"
    assert decide(retry, Situation(cause, 2, False)) is Action.RETRY, "other bits: the hardware, once more"
    assert decide(retry, Situation(cause, MOST_ATTEMPTS, False)) is Action.STOP


@pytest.mark.parametrize("cause", DAMAGES)
def test_damage_is_repaired_where_it_can_be_and_else_taken_back(cause: Cause) -> None:
    retry = config("retry")
    assert decide(retry, Situation(cause, 1, False, repairable=True)) is Action.RETRY
    assert decide(retry, Situation(cause, 1, False, repairable=False)) is Action.ROLLBACK
    assert decide(retry, Situation(cause, MOST_ATTEMPTS, False, repairable=True)) is Action.ROLLBACK
    assert decide(config("stop"), Situation(cause, 1, False)) is Action.STOP


def test_gradients_that_are_never_the_same_end_the_run() -> None:
    actions = [decide(config("retry"), Situation(Cause.GRADIENTS, n, False)) for n in range(2, MOST_ATTEMPTS + 1)]
    assert actions == [Action.RETRY] * (MOST_ATTEMPTS - 2) + [Action.STOP]


@pytest.mark.parametrize("policy", ["skip", "rollback"])
def test_setbacks_in_a_row_come_to_an_end(policy: str) -> None:
    limited = config(policy, limit=3)
    actions = [decide(limited, Situation(Cause.NORM, 1, None, setbacks=n)) for n in range(5)]
    assert actions == [Action(policy)] * 3 + [Action.STOP] * 2


def test_setbacks_are_counted_until_the_run_gets_further_than_ever() -> None:
    memory = Memory.empty(GuardConfig())
    for step in (4, 5):
        memory.learn(step, 1.0, 1.0, Verdict(Action.SKIP, Cause.NORM))
    assert memory.setbacks == 2
    memory.learn(9, 1.0, 1.0, Verdict(Action.ROLLBACK, Cause.NORM))
    assert memory.setbacks == 3
    memory.learn(7, 1.0, 1.0, Verdict(Action.COMMIT))
    assert memory.setbacks == 3, "a step done before, done again"
    memory.learn(10, 1.0, 1.0, Verdict(Action.COMMIT))
    assert memory.setbacks == 0
    assert memory.left_out == {4: str(Cause.NORM), 5: str(Cause.NORM)}


def test_memory_survives_a_checkpoint() -> None:
    memory = Memory.empty(GuardConfig(leave_out=[3]))
    memory.learn(1, 1.5, 0.5, Verdict(Action.COMMIT, attempts=2))
    memory.learn(2, 9.0, 9.0, Verdict(Action.SKIP, Cause.LOSS))
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

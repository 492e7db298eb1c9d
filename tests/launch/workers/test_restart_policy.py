"""The verdict on a failure: what is tried again, when a budget ends, what a crash loop is."""

import pytest

from bagualu.fault_tolerance.config import RestartConfig
from bagualu.launch.workers.restart_policy import Restarts, announcement
from bagualu.trainer.process.failure import FAILED, LOOPED, REFUSED, Failure
from bagualu.trainer.recipe.compose import compose


def lost(step, rank=0, kind="killed"):
    return Failure(rank, f"step {step}, backward", "killed by SIGKILL", 0.0, kind, step)


def restarts(**changes):
    return Restarts(RestartConfig(**{"limit": 100, **changes}))


def test_a_failure_is_tried_again_until_the_budget_is_spent():
    of_three = restarts(limit=3)
    verdicts = [of_three.decide(lost(step)) for step in (3, 5, 7, 9)]
    assert [verdict.again for verdict in verdicts] == [True, True, True, False]
    assert "restart.limit=3" in verdicts[3].failure.cause
    assert verdicts[3].failure.exit_code == FAILED


def test_no_budget_no_restart():
    verdict = restarts(limit=0).decide(lost(3))
    assert not verdict.again
    assert verdict.failure == lost(3)


def test_every_pause_is_twice_the_last_up_to_a_minute():
    many = restarts(backoff_seconds=0.5)
    assert [many.decide(lost(step)).pause_seconds for step in range(1, 10)] == [0.5, 1, 2, 4, 8, 16, 32, 60, 60]


class Clock:
    """A clock that stands still until it is moved."""

    now = 1000.0

    def __call__(self):
        return self.now


@pytest.mark.parametrize(("healthy", "pauses"), [(600.0, [1, 2, 4, 1, 2, 4]), (601.0, [1, 2, 4, 8, 16, 32]), (0.0, [1] * 6)])
def test_the_pauses_begin_anew_once_a_run_was_healthy(healthy, pauses):
    clock = Clock()
    several = Restarts(RestartConfig(limit=100, backoff_reset_seconds=healthy), clock)
    found = []
    for step, seconds in enumerate([5.0, 5.0, 5.0, 600.0, 5.0, 5.0], 1):
        clock.now += seconds
        found.append(several.decide(lost(step)).pause_seconds)
        clock.now += found[-1]  # the workers start when the pause is over
    assert found == pauses


def test_a_pause_that_goes_on_is_no_time_in_which_a_run_is_healthy():
    clock = Clock()
    several = Restarts(RestartConfig(limit=100, backoff_seconds=40.0, backoff_reset_seconds=50.0), clock)
    assert several.decide(lost(1)).pause_seconds == 40
    clock.now += 80.0
    assert several.decide(lost(2)).pause_seconds == 60  # 40 s after the restart


@pytest.mark.parametrize(("kind", "code"), [("recipe", REFUSED), ("final", FAILED)])
def test_what_would_only_happen_again_is_not_tried_again(kind, code):
    verdict = restarts().decide(lost(3, kind=kind))
    assert not verdict.again
    assert verdict.failure.exit_code == code


def test_a_step_that_fails_again_with_nothing_gained_is_a_crash_loop():
    twice = restarts(same_step_limit=2)
    assert twice.decide(lost(7)).again
    verdict = twice.decide(lost(7, rank=3))
    assert not verdict.again
    assert verdict.failure.exit_code == LOOPED
    assert verdict.failure.phase == "step 7, backward"
    assert "2 times" in verdict.failure.cause


def test_storage_that_cannot_be_written_is_waited_for_and_is_no_crash_loop():
    three = restarts(same_step_limit=2, limit=3)
    verdicts = [three.decide(lost(0, kind="storage")) for _ in range(4)]
    assert [verdict.pause_seconds for verdict in verdicts[:3]] == [1, 2, 4]
    assert not verdicts[3].again
    assert verdicts[3].failure.exit_code == FAILED


def test_a_failure_on_the_way_back_to_the_step_gains_nothing():
    twice = restarts(same_step_limit=2)
    assert [twice.decide(lost(step)).again for step in (7, 5, 7)] == [True, True, False]


def test_coming_further_begins_a_new_count():
    twice = restarts(same_step_limit=2)
    assert all(twice.decide(lost(step)).again for step in (7, 8, 7, 9, 8))


def test_a_crash_loop_before_the_first_step_is_one_too():
    twice = restarts(same_step_limit=2)
    assert [twice.decide(lost(0)).again for _ in range(2)] == [True, False]


def test_what_began_on_another_node_is_judged_there():
    twice = restarts(same_step_limit=2, limit=3)
    peer = lost(7, kind="peer")
    assert [twice.decide(peer, elsewhere=True).again for _ in range(4)] == [True, True, True, False]


def test_a_rank_that_fails_again_and_again_is_left_out_once():
    elastic = restarts(same_step_limit=2, elastic=True)
    verdicts = [elastic.decide(lost(7, rank=2), may_drop=True) for _ in range(4)]
    assert [verdict.again for verdict in verdicts] == [True, True, True, False]
    assert [verdict.without_rank for verdict in verdicts] == [False, True, False, False]
    assert verdicts[3].failure.exit_code == LOOPED


def test_a_step_that_fails_on_any_rank_is_no_ranks_fault():
    elastic = restarts(same_step_limit=2, elastic=True)
    assert elastic.decide(lost(7, rank=2), may_drop=True).again
    assert not elastic.decide(lost(7, rank=1), may_drop=True).again


def test_where_no_single_rank_is_at_fault_none_is_left_out():
    elastic = restarts(same_step_limit=2, elastic=True)
    assert elastic.decide(lost(7, rank=-1, kind="hung"), may_drop=True).again
    assert not elastic.decide(lost(7, rank=-1, kind="hung"), may_drop=True).again


def test_the_announcement_says_what_where_which_and_whence(tmp_path):
    recipe = compose([f"run.dir={tmp_path}"])
    one = restarts(limit=5, backoff_seconds=2)
    line = announcement(one.decide(lost(7, rank=3)), one, recipe)
    assert line == "rank 3 failed, step 7, backward: killed by SIGKILL; restart 1 of 5 in 2 s, from the beginning"
    (tmp_path / "checkpoints" / "step-00000005").mkdir(parents=True)
    assert announcement(one.decide(lost(8)), one, recipe).endswith("restart 2 of 5 in 4 s, from step-00000005")


@pytest.mark.parametrize("wrong", ["limit=-1", "backoff_seconds=-1", "backoff_reset_seconds=-1", "same_step_limit=0",
                                   "min_workers=0", "wait_seconds=0", "min_workers=2"])  # fmt: skip
def test_a_wrong_value_is_refused_with_the_fix(wrong):
    recipe = compose([f"restart.{wrong}"])
    with pytest.raises(ValueError, match=r"restart\.\w+=.*(e\.g\.|give) restart\.\w+="):
        recipe.validate(recipe.world_size())


def test_a_reset_of_pauses_that_are_all_0_is_refused():
    recipe = compose(["restart.backoff_seconds=0", "restart.backoff_reset_seconds=60"])
    with pytest.raises(ValueError, match=r"restart\.backoff_reset_seconds=60\.0 has no effect with restart\.backoff_seconds=0"):
        recipe.validate(recipe.world_size())

"""What is said of each planned fault, from the record of strikes, the ledger and the metrics alone."""

import pytest

from bagualu.fault_tolerance.injection.report import ENDED, NEVER, NO_EFFECT, NOT_FOUND, SURVIVED, Trace, outcomes
from bagualu.fault_tolerance.ledger.events import Event


def history(*entries):
    return [Event(what, wall=at, monotonic=at, clock="one", **dict(*more)) for at, what, *more in entries]


def train(at, step):
    return (at, "train", {"step": step})


KILLED = history(
    train(0, 1), train(1, 2), (2, "checkpoint", {"step": 2}), train(3, 3), train(4, 4), train(5, 5),
    (7, "failed", {"rank": 2, "cause": "killed by SIGKILL", "step": 5}), (8, "started"), (9, "joined"), train(10, 3), train(11, 4),
    train(12, 5), train(13, 6), (14, "ended", {"cause": "done"}),
)  # fmt: skip


def strike(fault, at, step, did=None):
    return {"fault": fault, "step": step, "wall": at, **({"did": did} if did else {})}


def test_a_kill_is_noticed_answered_and_costs_the_steps_since_the_checkpoint():
    (row,) = outcomes(["kill@step=5:rank=2"], Trace([strike("kill@step=5:rank=2", 5.5, 5)], KILLED, [], []))
    assert (row.struck_at, row.noticed, row.answered) == (5, "rank 2: killed by SIGKILL", "restart from step 2")
    assert (row.recovery_seconds, row.steps_lost, row.state) == (5.5, 2, SURVIVED)


def test_what_needs_no_restart_went_on_and_says_what_was_seen():
    strikes = [strike("slow@step=3", 3.5, 3), strike("nan@step=4:rank=1", 4.5, 4), strike("kill@step=5:rank=2", 5.5, 5)]
    metrics = [{"step": 4, "cause": "not finite", "attempts": 2}]
    slow, nan, kill = outcomes([one["fault"] for one in strikes], Trace(strikes, KILLED, metrics, []))
    assert (slow.noticed, slow.answered, slow.steps_lost, slow.state) == ("-", "went on", None, SURVIVED)
    assert (nan.noticed, nan.answered, nan.state) == ("not finite", "computed 2 times", SURVIVED)
    assert kill.answered == "restart from step 2"


def test_a_fault_that_never_struck_was_not_survived():
    rows = outcomes(["kill@step=5:rank=2", "kill@step=9"], Trace([strike("kill@step=5:rank=2", 5.5, 5)], KILLED, [], []))
    assert [(row.struck_at, row.state) for row in rows] == [(5, SURVIVED), (None, NEVER)]


def test_a_run_that_ended_there_did_not_survive():
    events = history(train(0, 1), (2, "failed", {"rank": 0, "cause": "x"}), (2, "ended", {"cause": "failed"}))
    (row,) = outcomes(["kill@step=1"], Trace([strike("kill@step=1", 1, 1)], events, [], []))
    assert (row.answered, row.state, row.recovery_seconds) == ("not started again", ENDED, None)


def test_two_of_the_same_are_two():
    strikes = [strike("kill@step=5", 5.5, 5), strike("kill@step=5", 12.5, 5)]
    rows = outcomes(["kill@step=5"] * 3, Trace(strikes, KILLED, [], []))
    assert [row.state for row in rows] == [SURVIVED, SURVIVED, NEVER]


def test_damage_is_noticed_when_it_is_read_and_a_full_disk_by_the_save_that_failed():
    strikes = [
        strike("corrupt@step=3", 3.5, 3, did="byte 9 of step-00000002/rank-00000.safetensors"),
        strike("full_disk@step=4", 4.5, 4),
        strike("kill@step=5:rank=2", 5.5, 5),
    ]
    said = "step 4 was not saved: rank 1: No space left on device"
    metrics = [{"step": 5, "checkpoint_error": f"{said}, planned: full_disk@step=4; earlier ones are whole"}]
    plan = [one["fault"] for one in strikes]
    corrupt, full, _ = outcomes(plan, Trace(strikes, KILLED, metrics, ["damaged-step-00000002-1f"]))
    assert (corrupt.noticed, corrupt.answered) == ("its hashes, while resuming", "the previous checkpoint was used")
    assert (full.noticed, full.answered) == (f"{said} as planned", "that save was given up")
    assert (corrupt.state, full.state) == (SURVIVED, SURVIVED)
    corrupt, full, _ = outcomes(plan, Trace(strikes, KILLED, [], []))
    assert (corrupt.noticed, corrupt.answered, full.noticed, full.answered) == ("-", "never read", "-", "no write was refused")
    assert (corrupt.state, full.state) == (NO_EFFECT, NO_EFFECT)


def test_a_full_disk_gets_no_credit_for_what_another_one_or_another_fault_did():
    """Rank 2 was killed before it wrote anything; the save that failed later was refused to rank 1."""
    plan = ["full_disk@step=4:rank=2", "kill@step=5:rank=2", "full_disk@step=4"]
    strikes = [strike(plan[0], 4.5, 4), strike(plan[1], 5.5, 5), strike(plan[2], 10.5, 4)]
    metrics = [
        {"step": 6, "checkpoint_error": f"step 6 was not saved: rank 1: No space left on device, planned: {plan[2]}; and so on"}
    ]
    first, _, second = outcomes(plan, Trace(strikes, KILLED, metrics, []))
    assert (first.noticed, first.state, first.recovery_seconds) == ("-", NO_EFFECT, None)
    assert (second.noticed, second.state) == ("step 6 was not saved: rank 1: No space left on device as planned", SURVIVED)


@pytest.mark.parametrize(("what", "key"), [("moment", "guard.check_every=1"), ("gradient", "guard.audit_every=1")])
def test_a_flip_that_nobody_has_seen_was_not_survived_but_not_found(what, key):
    fault = f"flip@step=4:what={what}"
    (row,) = outcomes([fault], Trace([strike(fault, 4.5, 4)], KILLED[:6], [], []))
    assert (row.noticed, row.state) == ("-", NOT_FOUND)
    assert key in row.answered
    another = [
        *KILLED[:5],
        *history((4.8, "discarded", {"step": 5}), train(5, 5), train(6, 6)),
    ]  # computed again, for another reason
    (row,) = outcomes([fault], Trace([strike(fault, 4.5, 4)], another, [], []))
    assert row.state == NOT_FOUND
    seen = [*KILLED[:5], *history((4.8, "discarded", {"step": 4}), train(5, 3))]
    (row,) = outcomes([fault], Trace([strike(fault, 4.5, 4)], seen, [], []))
    assert (row.noticed, row.answered, row.state) == ("the guard", "went back to a checkpoint", SURVIVED)


def test_a_nan_whose_line_was_written_anew_after_a_restart_is_told_from_the_ledger():
    """Steps 3 to 5 are done again after the kill, and their lines say nothing of what befell them the first time."""
    strikes = [strike("nan@step=4:rank=1", 4.5, 4), strike("kill@step=5:rank=2", 5.5, 5)]
    plan, lines = [one["fault"] for one in strikes], [{"step": step} for step in range(1, 7)]
    events = [*KILLED[:5], *history((4.8, "discarded", {"step": 4}), train(4.9, 4)), *KILLED[5:]]
    nan, kill = outcomes(plan, Trace(strikes, events, lines, []))
    assert (nan.noticed, nan.answered, nan.state) == ("the guard", "that attempt at the step was discarded", SURVIVED)
    assert (nan.recovery_seconds, kill.answered) == (None, "restart from step 2")
    for other in (history((4.8, "discarded", {"step": 5})), history((7.5, "discarded", {"step": 4})), []):  # of another step, start
        nan, _ = outcomes(plan, Trace(strikes, sorted([*KILLED, *other], key=lambda event: event.wall), lines, []))
        assert (nan.noticed, nan.state) == ("-", NO_EFFECT)

"""What is said of each planned fault, from the record of strikes, the ledger and the metrics alone."""

from bagualu.fault_tolerance.injection.report import Trace, outcomes
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
    assert (row.recovery_seconds, row.steps_lost, row.survived) == (5.5, 2, True)


def test_what_needs_no_restart_went_on_and_says_what_was_seen():
    strikes = [strike("slow@step=3", 3.5, 3), strike("nan@step=4:rank=1", 4.5, 4), strike("kill@step=5:rank=2", 5.5, 5)]
    metrics = [{"step": 4, "cause": "not finite", "attempts": 2}]
    slow, nan, kill = outcomes([one["fault"] for one in strikes], Trace(strikes, KILLED, metrics, []))
    assert (slow.noticed, slow.answered, slow.steps_lost, slow.survived) == ("-", "went on", None, True)
    assert (nan.noticed, nan.answered, nan.survived) == ("not finite", "computed 2 times", True)
    assert kill.answered == "restart from step 2"


def test_a_fault_that_never_struck_was_not_survived():
    rows = outcomes(["kill@step=5:rank=2", "kill@step=9"], Trace([strike("kill@step=5:rank=2", 5.5, 5)], KILLED, [], []))
    assert [(row.struck_at, row.survived) for row in rows] == [(5, True), (None, False)]


def test_a_run_that_ended_there_did_not_survive():
    events = history(train(0, 1), (2, "failed", {"rank": 0, "cause": "x"}), (2, "ended", {"cause": "failed"}))
    (row,) = outcomes(["kill@step=1"], Trace([strike("kill@step=1", 1, 1)], events, [], []))
    assert (row.answered, row.survived, row.recovery_seconds) == ("not started again", False, None)


def test_two_of_the_same_are_two():
    strikes = [strike("kill@step=5", 5.5, 5), strike("kill@step=5", 12.5, 5)]
    rows = outcomes(["kill@step=5"] * 3, Trace(strikes, KILLED, [], []))
    assert [row.survived for row in rows] == [True, True, False]


def test_damage_is_noticed_when_it_is_read_and_a_full_disk_by_the_save_that_failed():
    strikes = [
        strike("corrupt@step=3", 3.5, 3, did="byte 9 of step-00000002/rank-00000.safetensors"),
        strike("full_disk@step=4", 4.5, 4),
        strike("kill@step=5:rank=2", 5.5, 5),
    ]
    metrics = [{"step": 5, "checkpoint_error": "step 4 was not saved: rank 1: No space left on device; earlier ones are whole"}]
    plan = [one["fault"] for one in strikes]
    corrupt, full, _ = outcomes(plan, Trace(strikes, KILLED, metrics, ["damaged-step-00000002-1f"]))
    assert (corrupt.noticed, corrupt.answered) == ("its hashes, while resuming", "the checkpoint before was taken")
    assert (full.noticed, full.answered) == ("step 4 was not saved: rank 1: No space left on device", "that save was given up")
    corrupt, full, _ = outcomes(plan, Trace(strikes, KILLED, [], []))
    assert (corrupt.noticed, corrupt.answered, full.noticed) == ("-", "never read", "-")

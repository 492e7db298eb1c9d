"""Every microsecond of a run is in exactly one category, whatever happened; and in the right one."""

import json
from dataclasses import asdict

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bagualu.fault_tolerance.ledger.events import Event, Ledger, read
from bagualu.fault_tolerance.ledger.totals import CATEGORIES, attribute

WHATS = ("launched", "started", "joined", "train", "start", "validation", "checkpoint", "balance", "discarded", "saved", "failed",
         "ended")  # fmt: skip


def history(*entries):
    """Events from (seconds, what) or (seconds, what, fields)."""
    return [Event(what, wall=1e9 + at, monotonic=at, clock="one", **dict(*more)) for at, what, *more in entries]


def spent(*entries):
    """Seconds by category, those with none left out."""
    totals = attribute(history(*entries))
    assert sum(totals[name] for name in CATEGORIES) == pytest.approx(totals["wall"], abs=1e-6)
    return {name: round(totals[name], 6) for name in CATEGORIES if totals[name]}


def step(number):
    return {"step": number}


START = ((0, "launched"), (1, "started"), (3, "joined"), (4, "start"))


def test_a_run_without_faults():
    assert spent(
        *START, (5, "train", step(1)), (7, "train", step(2)), (9, "checkpoint", step(2)), (10, "train", step(3)),
        (12, "validation", step(3)), (15, "checkpoint", step(3)), (16, "ended", {"cause": "done"}),
    ) == {"productive": 6, "checkpoint": 2, "validation": 3, "start": 5}  # fmt: skip


def test_a_commit_in_the_background_changes_nothing_of_what_goes_on():
    events = [
        (5, "train", step(1)),
        (7, "train", step(2)),
        (9, "train", step(3)),
        (11, "start"),
        (12, "train", step(3)),
        (14, "ended"),
    ]
    saved = (10, "saved", {"step": 1, "seconds": 2.5})
    assert spent(*START, *events[:3], saved, *events[3:]) == spent(*START, *events) == {"productive": 6, "lost": 2, "start": 6}


def test_steps_done_again_are_lost_with_the_one_cut_off_and_the_rest_is_detection_and_waiting():
    assert spent(
        *START, (5, "train", step(1)), (7, "checkpoint", step(1)), (8, "train", step(2)), (10, "train", step(3)),
        (13, "failed", {"since": 1e9 + 11.5}), (17, "started"), (18, "joined"), (20, "train", step(2)), (22, "train", step(3)),
        (24, "ended", {"cause": "done"}),
    ) == {"productive": 2 + 4, "checkpoint": 1, "lost": 2 + 1.5, "detection": 1.5, "waiting": 4, "start": 5 + 3}  # fmt: skip


def test_a_discarded_step_and_its_second_attempt():
    assert spent(
        (0, "train", step(1)), (2, "train", step(2)), (5, "discarded", step(2)), (6, "train", step(2)), (8, "train", step(3)),
        (9, "ended", {"cause": "done"}),
    ) == {"productive": 2 + 2 + 1, "lost": 4}  # fmt: skip


def test_rolling_back_loses_what_is_done_again():
    assert spent((0, "train", step(1)), (2, "train", step(2)), (4, "start"), (5, "train", step(1)), (7, "ended")) == {
        "productive": 2, "lost": 4, "start": 1,
    }  # fmt: skip


def test_between_a_stop_and_the_next_launch_the_run_waits_but_not_after_it_was_done():
    first = (*START, (5, "train", step(1)))
    again = ((107, "launched"), (108, "joined"), (110, "train", step(2)), (112, "ended", {"cause": "done"}))
    assert spent(*first, (7, "ended", {"cause": "stopped"}), *again) == {"productive": 4, "start": 8, "waiting": 100}
    assert spent(*first, (7, "ended", {"cause": "done"}), *again) == {"productive": 4, "start": 8}


def test_a_launcher_that_is_gone_without_a_word_leaves_waiting():
    assert spent(*START, (5, "train", step(1)), (7, "train", step(2)), (57, "launched"), (60, "train", step(1)), (62, "ended")) == {
        "productive": 2, "lost": 2, "waiting": 50, "start": 8,
    }  # fmt: skip


def test_what_a_rank_0_that_was_replaced_still_writes_does_not_count():
    mine, other = {"writer": "new"}, {"writer": "old", "step": 9}
    assert spent(
        (0, "joined", mine), (1, "train", {**mine, **step(1)}), (2, "train", other), (3, "ended", {"writer": "new"})
    ) == {"productive": 2, "start": 1}  # fmt: skip


def test_what_a_launcher_that_was_left_behind_still_writes_does_not_count():
    """The run went on on another machine, and was done before the first one knew."""
    left, other = {"writer": "left"}, {"writer": "other"}
    went_on = attribute(history(
        (0, "launched", left), (1, "started", left), (2, "train", step(1)), (3, "started", other), (4, "train", step(1)),
        (5, "ended", {"cause": "done"}),
    ))  # fmt: skip
    told_late = attribute(history(
        (0, "launched", left), (1, "started", left), (2, "train", step(1)), (3, "started", other), (4, "train", step(1)),
        (4.5, "failed", {**left, "step": 1}), (5, "ended", {"cause": "done"}), (6, "failed", left), (7, "ended", left),
    ))  # fmt: skip
    assert told_late == went_on


def test_all_that_the_newest_launcher_tells_counts():
    launcher, one, two = {"writer": "launcher"}, {"writer": "one"}, {"writer": "two"}
    totals = attribute(history(
        (0, "launched", launcher), (1, "started", launcher), (2, "joined", one), (3, "train", {**one, **step(1)}),
        (4, "failed", launcher), (5, "started", launcher), (6, "joined", two), (7, "train", {**two, **step(1)}),
        (8, "failed", launcher), (9, "ended", {**launcher, "cause": "failed"}),
    ))  # fmt: skip
    assert totals["restarts"] == 2
    assert totals["lost"] + totals["detection"] == 2


def test_machines_with_other_clocks_are_compared_by_the_wall():
    one = Event("train", wall=1000.0, monotonic=5.0, clock="one", step=1)
    two = Event("train", wall=1002.0, monotonic=70.0, clock="two", step=2)
    end = Event("ended", wall=900.0, monotonic=73.0, clock="two")  # its wall clock was set back meanwhile
    assert attribute([one, two, end])["productive"] == 5


EVENTS = st.builds(
    Event,
    what=st.sampled_from(WHATS),
    wall=st.floats(0, 2e9),
    monotonic=st.floats(0, 1e6),
    clock=st.sampled_from(["one", "two"]),
    writer=st.sampled_from(["", "x", "y"]),
    step=st.integers(0, 9),
    since=st.none() | st.floats(0, 2e9),
    cause=st.sampled_from(["", "done", "stopped", "failed"]),
)


@given(st.lists(EVENTS, max_size=30))
def test_any_history_adds_up_and_no_category_is_negative(events):
    totals = attribute(events)
    if events:
        assert all(totals[name] >= 0 for name in CATEGORIES)
        assert sum(totals[name] for name in CATEGORIES) == pytest.approx(totals["wall"], abs=1e-6)
        assert 0 <= totals["effective_training_time_ratio"] <= 1


@given(st.lists(EVENTS, min_size=1, max_size=30), st.lists(st.integers(0, 10**10), min_size=30, max_size=30))
def test_on_one_clock_the_categories_add_up_to_the_wall_time_to_the_microsecond(events, microseconds):
    times = sorted(microseconds[: len(events)])
    told = [
        Event(**{**asdict(event), "monotonic": at / 1e6, "clock": "one", "writer": ""} | ({"cause": "stopped"}))
        for event, at in zip(events, times, strict=True)
    ]
    totals = attribute(told)
    assert sum(round(totals[name] * 1e6) for name in CATEGORIES) == round(totals["wall"] * 1e6) == times[-1] - times[0]


def test_a_torn_line_is_passed_over_and_the_next_one_is_whole(tmp_path):
    ledger = Ledger(tmp_path)
    ledger.add("launched")
    ledger.add("train", step=3)
    ledger.close()
    path = tmp_path / "ledger.jsonl"
    whole = path.read_bytes()
    for cut in range(len(whole)):
        path.write_bytes(whole[:cut])
        again = Ledger(tmp_path, writer="x")
        again.add("joined")
        again.close()
        events = read(tmp_path)
        assert len(events) == sum(map(_is_json, whole[:cut].split(b"\n"))) + 1
        assert events[-1].what == "joined"
        assert events[-1].writer == "x"


def _is_json(line):
    try:
        json.loads(line)
    except ValueError:
        return False
    return True


def test_no_ledger_is_no_history(tmp_path):
    assert read(tmp_path) == []
    assert attribute([]) == {}


@pytest.mark.parametrize(
    "damage",
    [
        "\n",
        "[1]\n",
        "\0\0\0\0",
        '{"what": "train", "wall": "x", "monotonic": 1, "clock": "one"}\n',
        '{"what": "tra\n',
        "{}\n",
        '{"what": "train", "wall": NaN, "monotonic": NaN, "clock": "one"}\n',
        '{"what": 3, "wall": 1, "monotonic": 1, "clock": "one"}\n',
    ],
)
def test_damaged_lines_change_nothing_else(tmp_path, damage):
    events = history((0, "started"), (1, "joined"), (2, "train", step(1)), (3, "train", step(2)), (4, "ended", {"cause": "done"}))
    lines = [json.dumps(asdict(event)) + "\n" for event in events]
    (tmp_path / "ledger.jsonl").write_text(damage.join([*lines, lines[-1]]))
    assert read(tmp_path) == events
    assert attribute(read(tmp_path)) == attribute(events)

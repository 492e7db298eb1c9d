"""The closed form of a stretch against a run that is followed step by step."""

import numpy as np
import pytest

from bagualu.fault_tolerance.forecast.stretch import Cycle, stretch


def followed(steps, step, replica, save, durable, elapsed, start, offset, unknown):
    """The same in words: goes through start, steps, waits and saves until `elapsed` is over."""
    what = {"start": 0, "steps": 0, "partial": 0, "checkpoint": 0, "durable": 0, "finishing": 0}
    now, committed, position = 0, [], offset

    def spend(amount):
        nonlocal now
        part = min(amount, elapsed - now)
        now += part
        return part

    what["start"] = spend(start)
    started = now == start
    while started and now < elapsed:
        part = spend(step + replica)
        if part < step + replica:
            what["partial"], what["finishing"] = part, step + replica - part
            break
        what["steps"] += 1
        what["checkpoint"] += replica
        position += 1
        if position % steps == 0:
            # As if a save had been made at the beginning of the first cycle too.
            wait = max(0, durable - steps * (step + replica))
            part = spend(wait + save)
            what["checkpoint"] += part
            if part < wait + save:
                what["finishing"] = (wait + save - part) * (part > 0)
                break
            committed.append(now + durable)
    what["durable"] = sum(time <= elapsed - unknown for time in committed)
    return what


@pytest.mark.parametrize("durable", [0, 7, 40])
@pytest.mark.parametrize(("steps", "offset"), [(1, 0), (4, 0), (4, 3)])
def test_a_stretch_is_what_a_run_does_step_by_step(steps, offset, durable):
    for elapsed in range(400):
        for unknown in (0, 13):
            given = {"steps": steps, "step": 9, "replica": 2, "save": 5, "durable": durable}
            cycle = Cycle(np.array(steps), np.array(9), np.array(2), 5, durable)
            found = stretch(cycle, *(np.array(value) for value in (elapsed, 30, offset, unknown)))
            expected = followed(**given, elapsed=elapsed, start=30, offset=offset, unknown=unknown)
            assert {name: int(getattr(found, name)) for name in expected} == expected, elapsed


def test_the_parts_of_a_stretch_are_its_whole_time():
    draws = np.random.default_rng(0)
    elapsed = draws.integers(0, 10_000, 1000)
    cycle = Cycle(draws.integers(1, 9, 1000), draws.integers(1, 50, 1000), draws.integers(0, 5, 1000), 17, 60)
    done = stretch(cycle, elapsed, draws.integers(0, 500, 1000), draws.integers(0, 9, 1000) % cycle.steps, np.array(0))
    assert (done.start + done.steps * cycle.step + done.partial + done.checkpoint == elapsed).all()

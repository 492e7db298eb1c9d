"""Divides a run's time into categories according to its events; every microsecond is in exactly one category. Pure functions.

productive   steps whose result survived
checkpoint   training waited for a save
validation   the validation loss was computed
balance      training waited while layers moved between ranks
lost         steps that were repeated, discarded or cut off by a failure
start        from a launch or a restart to its first step
detection    from a failure until the launcher noticed it
waiting      pauses before restarts, and the time between a launch that ended early and the next launch
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from bagualu.fault_tolerance.ledger.events import Event

CATEGORIES = ("productive", "checkpoint", "validation", "balance", "lost", "start", "detection", "waiting")
PHASES = {
    "launched": "start", "started": "start", "joined": "start", "start": "start", "train": "train",
    "checkpoint": "checkpoint", "validation": "validation", "balance": "balance", "failed": "waiting", "ended": "waiting",
}  # fmt: skip
"""The phase that begins with each kind of event (`Event.what`); other events are treated separately."""
_BEGINS = ("joined", "started")
"""The first event that each start of rank 0 writes, and the event that a launcher writes when it starts workers that include rank
0."""
_ALWAYS = ("launched", *_BEGINS)
"""Events that `current` keeps even if their writer is not the newest."""


@dataclass
class _Stretch:
    """A period of the run in a single category; `step` is the step trained in a "productive" period."""

    microseconds: int
    category: str
    step: int = 0


def attribute(events: Sequence[Event]) -> dict[str, Any]:
    """Returns a dictionary with the seconds of each category, their sum `wall`, `effective_training_time_ratio` (productive / wall)
    and `restarts` (the number of failures that the launcher noticed in order to restart).

    The time between the end of a finished run and a later launch that continues it is in no category. Without events it returns {}.
    """
    if not events:
        return {}
    events = current(events)
    stretches = _stretches(events)
    totals = {name: sum(stretch.microseconds for stretch in stretches if stretch.category == name) for name in CATEGORIES}
    wall = sum(totals.values())
    return {
        **{name: microseconds / 1e6 for name, microseconds in totals.items()},
        "wall": wall / 1e6,
        "effective_training_time_ratio": totals["productive"] / wall if wall else 0.0,
        "restarts": sum(event.what == "failed" for event in events),
    }


def current(events: Sequence[Event]) -> list[Event]:
    """Returns the events without those that an older start of rank 0, or an older launcher, wrote after a newer one began."""
    kept, newest = [], dict.fromkeys(_BEGINS, "")
    for event in events:
        if event.what in _BEGINS:
            newest[event.what] = event.writer
        if event.what in _ALWAYS or event.writer in ("", *newest.values()):
            kept.append(event)
    return kept


def _stretches(events: list[Event]) -> list[_Stretch]:
    stretches: list[_Stretch] = []
    times = _axis(events)
    phase, step, reached = "waiting", 0, 0
    for index, event in enumerate(events):
        if index:
            _close(stretches, times[index] - times[index - 1], phase, step, event)
        if event.what == "train":
            if event.step <= reached:
                _lose(stretches, event.step)
            reached = event.step
        if event.what == "discarded":
            _lose(stretches, event.step, event.step)
            phase = "lost"
        elif event.what != "saved":  # after which training goes on as before
            phase, step = PHASES.get(event.what, phase), event.step
        if event.what == "ended" and event.cause == "done":
            phase = "over"
    return [stretch for stretch in stretches if stretch.category != "over"]


def _close(stretches: list[_Stretch], microseconds: int, phase: str, step: int, event: Event) -> None:
    """Appends the stretches of the `microseconds` in `phase` before `event`: for a failure two, before and after it happened."""
    if event.what == "failed":
        since = event.wall if event.since is None else event.since
        unseen = min(microseconds, max(0, round((event.wall - since) * 1e6)))
        stretches.append(_Stretch(unseen, "detection"))
        stretches.append(_Stretch(microseconds - unseen, "lost" if phase == "train" else phase))
    elif event.what in ("launched", "started", "joined") and phase != "over":  # the end before was not recorded
        ran = phase not in ("start", "waiting")
        category = "waiting" if event.what == "launched" else "start" if ran else phase
        stretches.append(_Stretch(microseconds, category))
    else:
        stretches.append(_Stretch(microseconds, "productive" if phase == "train" else phase, step))


def _lose(stretches: list[_Stretch], first: int, last: int | None = None) -> None:
    """Moves the stretches of steps `first` to `last` (None: all later ones) to the category "lost"."""
    for stretch in stretches:
        if stretch.category == "productive" and first <= stretch.step and (last is None or stretch.step <= last):
            stretch.category = "lost"


def _axis(events: list[Event]) -> list[int]:
    """Returns the time of each event in microseconds, in non-decreasing order. Uses wall clocks only between different machines."""
    times: list[int] = []
    offset, before = 0, None
    for event in events:
        own = round(event.monotonic * 1e6)
        if before is not None and event.clock != before.clock:
            offset = times[-1] + max(0, round(event.wall * 1e6) - round(before.wall * 1e6)) - own
        times.append(max(own + offset, times[-1] if times else own + offset))
        before = event
    return times

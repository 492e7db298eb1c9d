"""What became of each planned fault: how it was noticed and answered, what it cost. Pure functions, free of torch."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from bagualu.fault_tolerance.injection.plan import parse
from bagualu.fault_tolerance.ledger.events import Event

_PROGRESS = ("train", "checkpoint", "validation", "ended")


@dataclass(frozen=True)
class Outcome:
    """Of one planned fault. Seconds and steps are None where nothing had to be recovered."""

    fault: str
    struck_at: int | None
    """Step; None: the run never came to it."""
    did: str
    noticed: str
    """By what the launcher or the ranks noticed, and who was named."""
    answered: str
    recovery_seconds: float | None
    """From the strike to the next step finished by workers that were started again."""
    steps_lost: int | None
    survived: bool


def outcomes(
    plan: Sequence[str], strikes: Sequence[dict[str, Any]], events: Sequence[Event], metrics: Sequence[dict[str, Any]]
) -> list[Outcome]:
    """One for each fault of `plan`, in the order in which they struck, those that did not last.

    `strikes`: as Record.strikes gives them. `metrics`: the lines of metrics.jsonl.
    """
    found, ahead = [], list(plan)
    for index, strike in enumerate(strikes):
        if strike["fault"] not in ahead:  # of an earlier plan
            continue
        ahead.remove(strike["fault"])
        later = [one["wall"] for one in strikes[index + 1 :] if parse(one["fault"]).ends_process]
        found.append(_outcome(strike, min(later, default=float("inf")), events, metrics))
    return found + [Outcome(fault, None, "", "did not strike", "", None, None, survived=False) for fault in ahead]


def _outcome(strike: dict[str, Any], until: float, events: Sequence[Event], metrics: Sequence[dict[str, Any]]) -> Outcome:
    went_on = any(event.wall > strike["wall"] and event.what in _PROGRESS and event.cause != "failed" for event in events)
    failure = next((event for event in events if event.what == "failed" and strike["wall"] <= event.wall < until), None)
    noticed, answered, seconds, lost = _within(strike, metrics), "went on", None, None
    if failure is not None:
        noticed = f"rank {failure.rank}: {failure.cause}"
        answered, seconds, lost = _restart(strike, failure, events)
    return Outcome(
        strike["fault"], strike["step"], strike.get("did", ""), noticed, answered, seconds, lost, survived=went_on
    )  # fmt: skip


def _within(strike: dict[str, Any], metrics: Sequence[dict[str, Any]]) -> str:
    """What the ranks themselves saw of it, without a restart."""
    line = next((line for line in metrics if line["step"] == strike["step"]), {})
    return str(line.get("cause", "")) or "-"


def _restart(strike: dict[str, Any], failure: Event, events: Sequence[Event]) -> tuple[str, float | None, int | None]:
    """How the failure was answered, seconds until a step was finished again, finished steps that were done again."""
    at = list(events).index(failure)
    steps = [event for event in events[at:] if event.what == "train"]
    if not steps:
        return "not started again", None, None
    first = steps[0]
    after = events[list(events).index(first) + 1 :]
    finished = next((event for event in after if event.what in _PROGRESS), None)
    before = max((event.step - 1 for event in events[:at] if event.what == "train"), default=0)
    seconds = finished.wall - strike["wall"] if finished else None
    return f"restart from step {first.step - 1}", seconds, max(0, before - first.step + 1)

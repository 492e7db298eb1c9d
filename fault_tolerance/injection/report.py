"""What became of each planned fault: how it was noticed and answered, what it cost. Pure functions, free of torch."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from bagualu.fault_tolerance.injection.fault import Fault
from bagualu.fault_tolerance.injection.kinds import Corrupt, FullDisk
from bagualu.fault_tolerance.injection.plan import parse
from bagualu.fault_tolerance.ledger.events import Event

UNNOTICED = "-"
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


@dataclass(frozen=True)
class Trace:
    """What a run has left behind."""

    strikes: Sequence[dict[str, Any]]
    """As Record.strikes gives them."""
    events: Sequence[Event]
    metrics: Sequence[dict[str, Any]]
    """The lines of metrics.jsonl."""
    damaged: Sequence[str]
    """Names of the checkpoints that were found damaged and set aside."""


def outcomes(plan: Sequence[str], trace: Trace) -> list[Outcome]:
    """One for each fault of `plan`, in the order in which they struck, those that did not last."""
    found, ahead, strikes = [], list(plan), trace.strikes
    for index, strike in enumerate(strikes):
        if strike["fault"] not in ahead:  # of an earlier plan
            continue
        ahead.remove(strike["fault"])
        later = [one["wall"] for one in strikes[index + 1 :] if parse(one["fault"]).ends_process]
        found.append(_outcome(strike, min(later, default=float("inf")), trace))
    return found + [Outcome(fault, None, "", "did not strike", "", None, None, survived=False) for fault in ahead]


def _outcome(strike: dict[str, Any], until: float, trace: Trace) -> Outcome:
    events, fault = trace.events, parse(strike["fault"])
    went_on = any(event.wall > strike["wall"] and event.what in _PROGRESS and event.cause != "failed" for event in events)
    failure = next((event for event in events if event.what == "failed" and strike["wall"] <= event.wall < until), None)
    noticed, answered = _within(fault, strike, trace)
    seconds = lost = None
    if failure is not None and (fault.ends_process or noticed == UNNOTICED):
        noticed = f"rank {failure.rank}: {failure.cause}".replace(f": planned: {fault}", " as planned")
        answered, seconds, lost = _restart(strike, failure, events)
    return Outcome(str(fault), strike["step"], strike.get("did", ""), noticed, answered, seconds, lost, survived=went_on)


def _within(fault: Fault, strike: dict[str, Any], trace: Trace) -> tuple[str, str]:
    """What the ranks themselves saw of it, without a restart, and what they did."""
    if isinstance(fault, Corrupt) and fault.what == "checkpoint":
        name = strike.get("did", "").rpartition(" ")[2].partition("/")[0]
        found = any(f"{name}-" in one for one in trace.damaged)
        return ("its hashes, while resuming", "the checkpoint before was taken") if found else (UNNOTICED, "never read")
    if isinstance(fault, FullDisk):
        errors = (line["checkpoint_error"] for line in trace.metrics if line["step"] >= fault.step and "checkpoint_error" in line)
        error = next(errors, None)
        return (error.partition(";")[0], "that save was given up") if error else (UNNOTICED, "went on")
    line = next((line for line in trace.metrics if line["step"] == strike["step"]), {})
    return (str(line["cause"]), _answer(line)) if "cause" in line else (UNNOTICED, "went on")


def _answer(line: dict[str, Any]) -> str:
    return "the step was left out" if line.get("discarded") else f"computed {line.get('attempts', 1)} times"


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

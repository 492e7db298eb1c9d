"""Determines for each planned fault how it was noticed, how the run reacted, and what it cost. Pure functions."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from bagualu.fault_tolerance.injection.fault import Fault
from bagualu.fault_tolerance.injection.kinds import Corrupt, Flip, FullDisk, Nan
from bagualu.fault_tolerance.injection.plan import parse
from bagualu.fault_tolerance.ledger.events import Event

UNNOTICED = "-"
SURVIVED, NO_EFFECT, NOT_FOUND, NEVER, ENDED = "survived", "took no effect", "not found", "did not strike", "ended the run"
"""The values of `Outcome.state`. A fault that took no effect tests nothing; the damage of a fault that was not found may still be
in the weights."""
_PROGRESS = ("train", "checkpoint", "validation", "ended")


@dataclass(frozen=True)
class Outcome:
    """The consequences of a planned fault. `recovery_seconds` and `steps_lost` are None if no restart followed."""

    fault: str
    struck_at: int | None
    """The step in which the fault struck; None if the fault did not strike."""
    did: str
    """Details of what the fault did, e.g. the changed byte; "" if there are none."""
    noticed: str
    """How the launcher or the ranks noticed the fault, and which rank they named; UNNOTICED if they did not notice it."""
    answered: str
    """How the run reacted to the fault; "" if the fault did not strike."""
    recovery_seconds: float | None
    """Seconds from the strike until restarted workers had finished their first step."""
    steps_lost: int | None
    """The number of steps that the restarted workers repeated."""
    state: str
    """What the fault led to: SURVIVED, NO_EFFECT, NOT_FOUND, NEVER (it did not strike) or ENDED (it ended the run)."""


@dataclass(frozen=True)
class Trace:
    """The records of a run from which the outcomes of its planned faults are determined."""

    strikes: Sequence[dict[str, Any]]
    """The result of `Record.strikes`."""
    events: Sequence[Event]
    metrics: Sequence[dict[str, Any]]
    """The lines of metrics.jsonl."""
    damaged: Sequence[str]
    """The names of damaged checkpoints that were set aside."""


def outcomes(plan: Sequence[str], trace: Trace) -> list[Outcome]:
    """Returns an outcome for each fault of `plan`, in the order in which the faults struck; those that did not strike come last."""
    results, ahead, strikes = [], list(plan), trace.strikes
    for index, strike in enumerate(strikes):
        if strike["fault"] not in ahead:  # it belongs to an earlier plan
            continue
        ahead.remove(strike["fault"])
        later = [other["wall"] for other in strikes[index + 1 :] if parse(other["fault"]).ends_process]
        results.append(_outcome(strike, min(later, default=float("inf")), trace))
    return results + [Outcome(fault, None, "", UNNOTICED, "", None, None, NEVER) for fault in ahead]


def _outcome(strike: dict[str, Any], until: float, trace: Trace) -> Outcome:
    events, fault = trace.events, parse(strike["fault"])
    went_on = any(event.wall > strike["wall"] and event.what in _PROGRESS and event.cause != "failed" for event in events)
    failure = next((event for event in events if strike["wall"] <= event.wall < until and _is_of(event, fault)), None)
    noticed, answered = _within(fault, strike, trace)
    seconds = lost = None
    if failure is not None and (fault.ends_process or noticed == UNNOTICED):
        named = failure.rank is not None and failure.rank >= 0
        noticed = _as_planned(f"rank {failure.rank}: {failure.cause}" if named else failure.cause, fault)
        answered, seconds, lost = _restart(strike, failure, events)
    state = SURVIVED if went_on else ENDED
    if noticed == UNNOTICED and went_on:
        state = NO_EFFECT if isinstance(fault, Corrupt | FullDisk | Nan) else NOT_FOUND if isinstance(fault, Flip) else SURVIVED
    return Outcome(str(fault), strike["step"], strike.get("did", ""), noticed, answered, seconds, lost, state)


def _is_of(event: Event, fault: Fault) -> bool:
    """Returns whether `fault` may be the cause of the event. A fault that does not end its process is not blamed for another rank's
    failure."""
    if event.what != "failed":
        return False
    return fault.ends_process or f"planned: {fault}" in event.cause or (event.rank == fault.rank and "planned: " not in event.cause)


def _as_planned(text: str, fault: Fault) -> str:
    for before in (": ", ", "):
        text = text.replace(f"{before}planned: {fault}", " as planned")
    return text


def _within(fault: Fault, strike: dict[str, Any], trace: Trace) -> tuple[str, str]:
    """Returns (how the ranks noticed the fault, how they reacted without a restart)."""
    if isinstance(fault, Corrupt) and fault.what == "checkpoint":
        name = strike.get("did", "").rpartition(" ")[2].partition("/")[0]
        damaged = any(f"{name}-" in aside for aside in trace.damaged)
        return ("its hashes, while resuming", "the previous checkpoint was used") if damaged else (UNNOTICED, "never read")
    if isinstance(fault, Corrupt):
        return UNNOTICED, "not known to have been read"
    if isinstance(fault, FullDisk):
        errors = (line["checkpoint_error"].partition(";")[0] for line in trace.metrics if "checkpoint_error" in line)
        error = next((error for error in errors if error.endswith(f"planned: {fault}")), None)
        return (_as_planned(error, fault), "that save was given up") if error else (UNNOTICED, "no write was refused")
    line = next((line for line in trace.metrics if line["step"] == strike["step"]), {})
    if "cause" in line:
        return str(line["cause"]), _answer(line)
    if isinstance(fault, Nan | Flip) and _taken_back(strike, trace.events):
        return "the guard", "went back to a checkpoint"  # the repeated steps do not show the fault
    if isinstance(fault, Nan) and _thrown_away(strike, trace.events):
        return "the guard", "that attempt at the step was discarded"  # a later restart has rewritten the step's line
    if isinstance(fault, Flip):
        key = "guard.audit_every" if fault.what == "gradient" else "guard.check_every"
        return UNNOTICED, f"that step was not checked: {key}=1 checks every step"
    return UNNOTICED, "went on"


def _taken_back(strike: dict[str, Any], events: Sequence[Event]) -> bool:
    """Returns whether, before any restart, the run discarded a step and went back to a checkpoint from before the struck step."""
    later = [event for event in events if event.wall >= strike["wall"] and event.what in ("discarded", "train", "failed", "ended")]
    for event, after in pairwise(later):
        if event.what == "failed":
            return False
        if event.what == "discarded" and after.what == "train" and after.step <= strike["step"] and after.step < event.step:
            return True
    return False


def _thrown_away(strike: dict[str, Any], events: Sequence[Event]) -> bool:
    """Returns whether the first step that was discarded after the strike, before any restart, is the struck step."""
    later = (event for event in events if event.wall >= strike["wall"] and event.what in ("discarded", "failed", "ended"))
    first = next(later, None)
    return first is not None and (first.what, first.step) == ("discarded", strike["step"])


def _answer(line: dict[str, Any]) -> str:
    if line.get("deferred"):
        return "its samples were deferred and learnt from later"
    return "the step was left out" if line.get("discarded") else f"computed {line.get('attempts', 1)} times"


def _restart(strike: dict[str, Any], failure: Event, events: Sequence[Event]) -> tuple[str, float | None, int | None]:
    """Returns (how the launcher reacted to the failure, seconds from the strike until a step was finished again, number of repeated
    steps)."""
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

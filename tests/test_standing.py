"""What `assert_stood` would not let pass: a copy of a run stands, and does not with any one thing wrong in it."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.conftest import Undisturbed
from tests.parity import small_recipe
from tests.standing import assert_stood


def edited(name: str, change: Callable[[list[str]], list[str]]) -> Callable[[Path], None]:
    def edit(run: Path) -> None:
        path = run / name
        path.write_text("".join(change(path.read_text().splitlines(keepends=True))))

    return edit


def another_loss(lines: list[str]) -> list[str]:
    last = json.loads(lines[-1])
    return [*lines[:-1], json.dumps(last | {"loss": last["loss"] * (1 + 1e-15)}) + "\n"]


def another_sample(lines: list[str]) -> list[str]:
    first = json.loads(lines[0])
    return [json.dumps(first | {"ids": [first["ids"][0] + 1, *first["ids"][1:]]}) + "\n", *lines[1:]]


def another_state(run: Path) -> None:
    (run / "checkpoints" / "step-00000003").rename(run / "checkpoints" / "step-00000004")


def a_step_lost(lines: list[str]) -> list[str]:
    """Fails after the last step and does it again."""
    events = [json.loads(line) for line in lines]
    again = [events[-1] | {"what": "failed", "rank": 1, "cause": "x"}, next(one for one in events if one.get("step") == 3)]
    moment = {key: events[-1][key] for key in ("wall", "monotonic")}
    return [*lines[:-1], *(json.dumps(one | moment) + "\n" for one in again), lines[-1]]


WRONG: dict[str, Callable[[Path], None]] = {
    "ended": edited("summary.json", lambda lines: [line.replace('"done"', '"stopped"') for line in lines]),
    "loss": edited("metrics.jsonl", another_loss),
    "a step twice": edited("metrics.jsonl", lambda lines: [*lines, lines[-1]]),
    "state": another_state,
    "sample": edited("samples-0.jsonl", another_sample),
    "no sample": edited("samples-1.jsonl", lambda lines: lines[1:]),
    "ledger": edited("ledger.jsonl", lambda lines: lines[:-1]),
    "a step lost": edited("ledger.jsonl", a_step_lost),
    "half-written": lambda run: (run / "checkpoints" / ".saving-step-00000009-x").mkdir(),
}


@pytest.mark.parametrize("wrong", [None, *WRONG])
def test_a_run_with_anything_wrong_does_not_stand(tmp_path: Path, undisturbed: Undisturbed, wrong: str | None) -> None:
    reference = undisturbed(small_recipe(parallel__data=2, train__validation_sequences=0), "simulated")
    run = Path(shutil.copytree(reference, tmp_path / "run"))
    if wrong is None:
        assert_stood(run, reference, 0)
        return
    WRONG[wrong](run)
    with pytest.raises(AssertionError):
        assert_stood(run, reference, 0)

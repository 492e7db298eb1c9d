"""The tests of the guard turn red when what they test is taken out."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from bagualu.comm.errors import CommunicationError
from bagualu.fault_tolerance.guard.damage import DamageCheck
from bagualu.fault_tolerance.guard.gradient_checksums import Attempts
from bagualu.parallel.mesh import Mesh
from bagualu.trainer import step
from tests.trainer.faults import Fault, gradient
from tests.trainer.test_guard import (
    test_a_fault_stops_the_run_before_any_rank_applies_the_step as stops,
)
from tests.trainer.test_guard import (
    test_after_a_retry_a_repair_or_a_return_the_run_is_the_one_without_the_fault as leaves_no_trace,
)

Patch = pytest.MonkeyPatch


def agreement_is_local(patch: Patch) -> None:
    patch.setattr(Mesh, "sum_over", lambda mesh, axis, *figures: torch.stack([one.double() for one in figures]).tolist())


def update_comes_before_the_judgement(patch: Patch) -> None:
    agree = step._agree

    def too_early(parts: Any, *args: Any) -> Any:
        agreed = agree(parts, *args)
        step._update(parts, 1e-3, agreed.norm)
        return agreed

    patch.setattr(step, "_agree", too_early)


def nothing_is_sealed(patch: Patch) -> None:
    patch.setattr(DamageCheck, "_broken", lambda check, rows: [])


def copies_are_not_compared(patch: Patch) -> None:
    patch.setattr(DamageCheck, "_bad_copies", lambda check, state: [])


def attempts_are_not_compared(patch: Patch) -> None:
    patch.setattr(Attempts, "differing", lambda attempts, zero: [torch.zeros_like(zero)] * 3)


def weights_are_not_gathered_again(patch: Patch) -> None:
    patch.setattr(DamageCheck, "repair", lambda check, damages: None)


CASES = [
    (agreement_is_local, stops, gradient("nan")),
    (update_comes_before_the_judgement, stops, gradient("nan")),
    (update_comes_before_the_judgement, stops, Fault("copy")),
    (nothing_is_sealed, stops, Fault("exp_avg")),
    (copies_are_not_compared, stops, Fault("copy")),
    (attempts_are_not_compared, stops, gradient()),
    (weights_are_not_gathered_again, leaves_no_trace, Fault("copy")),
]


@pytest.mark.parametrize(("mutate", "test", "fault"), CASES, ids=[f"{m.__name__}-{f.where}" for m, _, f in CASES])
def test_a_mutant_is_caught(tmp_path: Path, mutate: Callable[[Patch], None], test: Any, fault: Fault) -> None:
    test(tmp_path / "sound", "simulated", "data", fault)
    with pytest.MonkeyPatch.context() as patch:
        mutate(patch)
        with pytest.raises((AssertionError, CommunicationError, RuntimeError)):
            test(tmp_path / "mutant", "simulated", "data", fault)

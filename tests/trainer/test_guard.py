"""Test 30 of the survey: NaN, spikes and flipped bits. No rank applies the step, the culprit is named, the policy is followed,
and afterwards every bit is that of the run that never had the fault, or of the run that leaves those samples out."""

from dataclasses import dataclass
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import torch

from bagualu.comm.group import Communicator
from bagualu.fault_tolerance.checkpoint.reading.inspect import verify
from bagualu.trainer.recipe.config import Recipe
from tests.harness import ON_GPU, run
from tests.parity import small_recipe
from tests.trainer.faults import Ending, Fault, assert_same_bits, gradient, reduced, train

STEPS, BAD = 7, 5
MOE = {"model__moe__experts": 4, "model__moe__ffn": 8, "model__moe__every": 2, "model__moe__bias_rate": 0.01}
LAYOUTS: dict[str, dict[str, Any]] = {
    "data": {"parallel__data": 2},
    "replicated": {"parallel__data": 4, "parallel__zero": 0, "train__dtype": "float32"},
    "tensor": {"parallel__data": 2, "parallel__tensor": 2, "train__dtype": "bfloat16", "train__micro_batch": 2},
    "sequence": {"parallel__data": 2, "parallel__tensor": 2, "parallel__sequence": True, "train__micro_batch": 2},
    "pipeline": {"parallel__data": 2, "parallel__pipeline": 2, "model__tie_embeddings": True, "train__dtype": "float32"},
    "sharded": {"parallel__data": 2, "parallel__zero": 2, "parallel__bucket_bytes": 2048},
    "gathered": {"parallel__data": 2, "parallel__zero": 3, "train__dtype": "bfloat16"},
    "expert": {"parallel__data": 4, "parallel__expert": 2, "train__dtype": "bfloat16", **MOE},
}
GLOO = ("replicated", "pipeline", "expert")


def recipe_in(folder: Path, layout: str, **changes: Any) -> Recipe:
    defaults: dict[str, Any] = {
        "run__dir": str(folder), "train__steps": STEPS, "train__validation_sequences": 0, "optim__schedule": "constant",
        "checkpoint__every": 0, "guard__check_every": 1, "guard__audit_every": BAD, "guard__spike_window": 4,
        "guard__spike_factor": 20.0, "model__layers": 2, "data__global_batch": 4, **LAYOUTS[layout],
    }  # fmt: skip
    return small_recipe(**{**defaults, **changes})


def runs(backend: str, recipe: Recipe, *args: Any) -> list[Ending]:
    endings: list[Ending] = run(backend, recipe.world_size(), train, recipe, *args)
    for ending in endings:  # what a rank says is what all say
        assert repr(ending.lines) == repr(endings[0].lines)
        assert (ending.error, ending.guard) == (endings[0].error, endings[0].guard)
    return endings


def cases(first: int) -> list[Any]:
    """Faults on every layout, on threads; the rest of them on one layout, and some on processes too. Of the product of faults and
    layouts all but every third case is slow, from the case `first` on, so that each fault, and each layout, has a third of the
    others."""
    found: list[tuple[str, str, Fault]] = []
    quick: list[tuple[str, str, Fault]] = []
    for number, (layout, changes) in enumerate(LAYOUTS.items(), first):
        last = small_recipe(**changes).world_size() - 1
        held = Fault("exp_avg_sq") if layout == "replicated" else Fault("copy", rank=last)
        faults = [gradient("nan", rank=last), gradient(rank=last), Fault("exp_avg", rank=last), held]
        only = [Fault("buffer", rank=last)] if layout == "expert" else []
        found += [("simulated", layout, fault) for fault in [*faults, *only]]
        quick += [("simulated", layout, fault) for fault in [*faults[number % 3 :: 3], *only]]
        found += (processes := [("gloo", layout, fault) for fault in faults[1::2] if layout in GLOO])
        quick += processes[number % 2 :: 2]
    more = [gradient("huge"), reduced("nan"), reduced(), Fault("weight", rank=0), Fault("exp_avg_sq", "nan"), Fault("copy", "nan")]
    found += (alone := [("simulated", "data", fault) for fault in more])
    quick += alone
    on_gpu = [(str(ON_GPU.values[0]), layout, fault) for backend, layout, fault in found if backend == "simulated"]
    slow = [case for case in found if case not in quick]
    return [
        pytest.param(backend, layout, fault, id=f"{backend}-{layout}-{fault.where}-{fault.how}", marks=marks)
        for cases, marks in ((quick, ()), (slow, pytest.mark.slow), (on_gpu, ON_GPU.marks))
        for backend, layout, fault in cases
    ]


def followed(policy: str) -> dict[str, str]:
    return dict.fromkeys(("guard__on_nonfinite", "guard__on_spike", "guard__on_disagreement"), policy)


def left_out(steps: list[int], layout: str, folder: Path, *args: Any, **changes: Any) -> list[Ending]:
    """A run that is told to leave steps out."""
    return runs("simulated", recipe_in(folder, layout, guard__leave_out=steps, **changes), *args)


@cache
def straight(backend: str, layout: str, steps: int, **changes: Any) -> list[Ending]:
    """A run that nothing happens to."""
    with TemporaryDirectory() as folder:
        return runs(backend, recipe_in(Path(folder), layout, train__steps=steps, **changes))


@pytest.mark.parametrize(("backend", "layout", "fault"), cases(0))
def test_a_fault_stops_the_run_before_any_rank_applies_the_step(tmp_path: Path, backend: str, layout: str, fault: Fault) -> None:
    """The strictest policy: all that is not damaged itself is bit for bit what it was after the step before."""
    policy = followed("stop")
    before = straight(backend, layout, BAD - 1)
    found = runs(backend, recipe_in(tmp_path / "run", layout, **policy), fault)
    assert f"step {BAD}: " in found[0].error
    assert len(found[0].lines) == BAD - 1
    if fault.where not in ("gradient", "reduced"):
        what = {"copy": "working copy", "buffer": "weight"}.get(fault.where, fault.where)
        assert f"rank {fault.rank}: {what} of " in found[0].error
        keep = [rank for rank in range(len(found)) if rank != fault.rank]
        found, before = [found[rank] for rank in keep], [before[rank] for rank in keep]
    assert_same_bits(found, before)


@pytest.mark.parametrize(("backend", "layout", "fault"), cases(1))
def test_after_a_retry_a_repair_or_a_return_the_run_is_the_one_without_the_fault(
    tmp_path: Path, backend: str, layout: str, fault: Fault
) -> None:
    """The default policies. Transient faults leave no trace, and the rank at fault is named."""
    found = runs(backend, recipe_in(tmp_path, layout, checkpoint__every=3, checkpoint__keep=4), fault)
    assert found[0].error == ""
    assert_same_bits(found, straight(backend, layout, STEPS))
    assert [line["step"] for line in found[0].lines] == list(range(1, STEPS + 1))
    assert found[0].saved == [f"step-{step:08}" for step in (3, 6, 7)]
    held_elsewhere = layout in ("replicated", "pipeline")  # there: the tied embedding, by the other end
    taken_back = fault.where in ("weight", "exp_avg", "exp_avg_sq") and not held_elsewhere
    assert (found[0].guard["rolled_back"], found[0].guard["skipped_steps"]) == (int(taken_back), [])
    if not taken_back:
        line = found[0].line(BAD)
        assert line["ranks"] == [fault.rank]
        assert line["attempts"] > 1
        assert "discarded" not in line


@pytest.mark.parametrize(("policy", "layout"), [("skip", "data"), *(("retry", layout) for layout in LAYOUTS)])
def test_what_comes_out_bad_every_time_is_left_out(tmp_path: Path, layout: str, policy: str) -> None:
    """The same bits when computed again: not the hardware. The run goes on as one that was told to leave the step out."""
    fault, again = gradient("nan", always=True), policy == "retry"
    found = runs("simulated", recipe_in(tmp_path / "run", layout, guard__on_nonfinite=policy), fault)
    assert_same_bits(found, left_out([BAD], layout, tmp_path / "other"))
    line = found[0].line(BAD)
    assert (line["discarded"], line["cause"]) == (True, "loss or gradient not finite")
    assert line.get("attempts", 1) == 1 + again
    assert "ranks" not in line, "nobody's hardware is at fault"
    assert found[0].guard == {"skipped": 1, "computed_again": int(again), "rolled_back": 0, "skipped_steps": [BAD]}
    assert [line["step"] for line in found[0].lines] == list(range(1, STEPS + 1))


def test_a_rank_that_never_computes_the_same_twice_ends_the_run_and_is_named(tmp_path: Path) -> None:
    found = runs("simulated", recipe_in(tmp_path, "data"), gradient("random", always=True))
    assert "other bits on rank 1: the cause is the hardware, not the data or the code" in found[0].error
    assert "replace that hardware" in found[0].error
    assert_same_bits(found, straight("simulated", "data", BAD - 1))


def test_skips_in_a_row_come_to_an_end_that_says_it_is_not_single_samples(tmp_path: Path) -> None:
    recipe = recipe_in(tmp_path, "data", guard__limit=2, guard__audit_every=0, train__steps=12)
    found = runs("simulated", recipe, gradient("nan", always=True, steps=20))
    assert f"step {BAD + 2}: loss or gradient not finite" in found[0].error
    assert "the data or the code" in found[0].error
    assert "so were 2 steps before it, so single samples are not the cause" in found[0].error
    assert [line.get("discarded", False) for line in found[0].lines] == [False] * (BAD - 1) + [True] * 2


class Learnable:
    """Data that a model soon knows: one token over and over. One sample of one step is nothing of the kind."""

    bad_step = 14

    def __init__(self, batches: Any) -> None:
        self._batches = batches

    def __getattr__(self, name: str) -> Any:
        return getattr(self._batches, name)

    def batch(self, step: int, start: int, count: int) -> tuple[torch.Tensor, torch.Tensor]:
        tokens, labels = self._batches.batch(step, start, count)
        corrupt = step + 1 == self.bad_step and start <= 3 < start + count
        for row in range(count):
            if not (corrupt and start + row == 3):
                tokens[row], labels[row] = 7, 7
        return tokens, labels


class Clean(Learnable):
    bad_step = 0


SPIKED = {"train__steps": 16, "optim__lr": 0.05, "guard__audit_every": 0, "checkpoint__every": 3, "checkpoint__keep": 9}


@pytest.mark.parametrize(
    ("policy", "layout"),
    [
        ("skip", "data"),
        *(("rollback", layout) for layout in ("pipeline", "expert")),
        *(pytest.param("rollback", layout, marks=pytest.mark.slow) for layout in ("data", "tensor")),
    ],
)
def test_a_loss_spike_by_a_corrupted_sample_is_not_learnt_from(tmp_path: Path, layout: str, policy: str) -> None:
    spiked = {**SPIKED, "data__global_batch": 8 if layout == "data" else 4}  # and the rest of the batch hides it more
    changes = {**spiked, "guard__on_spike": policy, "guard__rollback_window": 3}
    found = runs("simulated", recipe_in(tmp_path / "run", layout, **changes), None, Learnable)
    assert found[0].error == ""
    bad = Learnable.bad_step
    out = [bad - 2, bad - 1, bad] if policy == "rollback" else [bad]
    assert_same_bits(found, left_out(out, layout, tmp_path / "other", None, Clean, **spiked))
    assert [line["step"] for line in found[0].lines] == list(range(1, 17))
    assert [line["step"] for line in found[0].lines if "discarded" in line] == out
    assert {found[0].line(step)["cause"] for step in out} <= {"loss spike", "gradient norm spike"}
    assert found[0].guard["skipped_steps"] == out
    assert found[0].guard["rolled_back"] == (policy == "rollback")
    assert found[0].saved[-2:] == ["step-00000015", "step-00000016"]


QUICK: dict[str, dict[str, Any]] = {
    "sgd": {"optim__lr": 0.2, "optim__momentum": 0.5, "optim__clip_norm": 1.0}, "muon": {"optim__lr": 0.05},
    "lion": {"optim__lr": 0.05},
}  # fmt: skip
"""Settings with which each optimizer soon knows what is learnable."""


@pytest.mark.parametrize(
    ("optimizer", "layout"), [("sgd", "sharded"), ("muon", "gathered"), pytest.param("lion", "replicated", marks=pytest.mark.slow)]
)
def test_every_optimizer_leaves_out_what_is_not_finite_and_what_spikes(tmp_path: Path, optimizer: str, layout: str) -> None:
    """Moments and weights are to the bit those of a run that was told to leave the step out."""
    by = {"optim__name": optimizer}
    found = runs("simulated", recipe_in(tmp_path / "nan", layout, **by), gradient("nan", always=True))
    assert_same_bits(found, left_out([BAD], layout, tmp_path / "without", **by))
    assert found[0].guard["skipped_steps"] == [BAD]
    spiked = {**by, **SPIKED, **QUICK[optimizer], "data__global_batch": 8}
    found = runs("simulated", recipe_in(tmp_path / "spike", "data", guard__on_spike="skip", **spiked), None, Learnable)
    assert_same_bits(found, left_out([Learnable.bad_step], "data", tmp_path / "clean", None, Clean, **spiked))
    assert found[0].guard["skipped_steps"] == [Learnable.bad_step]


def test_a_run_that_was_stopped_remembers_what_is_usual_and_what_is_left_out(tmp_path: Path) -> None:
    """Stopped before the spike and after it: the same bits, so the same judgement."""
    straight_on = runs("simulated", recipe_in(tmp_path / "straight", "data", **SPIKED), None, Learnable)
    pieces = recipe_in(tmp_path / "pieces", "data", **SPIKED)
    for stop_at in (12, 15, None):
        found = runs("simulated", pieces, None, Learnable, stop_at)
        pieces.checkpoint.resume = True
    assert_same_bits(found, straight_on)
    assert found[0].guard == straight_on[0].guard
    assert found[0].guard["skipped_steps"] == []


def test_damage_goes_back_past_checkpoints_that_may_hold_it(tmp_path: Path) -> None:
    """The flip comes before the checkpoint of the step before is written: that one is whole by its hashes, and wrong."""
    recipe = recipe_in(tmp_path, "data", checkpoint__every=1, checkpoint__keep=9, checkpoint__asynchronous=False)
    found = runs("simulated", recipe, Fault("exp_avg", step=BAD - 1, point="write"))
    assert_same_bits(found, straight("simulated", "data", STEPS))
    assert found[0].guard["rolled_back"] == 1
    assert found[0].saved == [f"step-{step:08}" for step in range(1, STEPS + 1)]


def test_damage_does_not_go_back_to_a_checkpoint_that_may_hold_it(tmp_path: Path) -> None:
    """The same flip where the older checkpoints are gone: to load the damage would be worse than to end."""
    recipe = recipe_in(tmp_path, "data", checkpoint__every=1, checkpoint__keep=1)
    found = runs("simulated", recipe, Fault("exp_avg", step=BAD - 1, point="write"))
    assert f"step {BAD}: optimizer state damaged: rank 1: exp_avg of " in found[0].error
    assert f"every checkpoint is of later than step {BAD - 2}, " in found[0].error
    assert "raise checkpoint.keep or lower guard.check_every" in found[0].error


def test_a_checkpoint_is_vouched_for_by_the_step_after_it(tmp_path: Path) -> None:
    """Checks of steps 3 and 6 alone could not tell whether what was saved after step 3 was still whole when it was saved."""
    recipe = recipe_in(tmp_path, "data", checkpoint__every=3, checkpoint__keep=1, guard__check_every=3)
    found = runs("simulated", recipe, Fault("exp_avg", step=6))
    assert (found[0].error, found[0].guard["rolled_back"]) == ("", 1)
    assert_same_bits(found, straight("simulated", "data", STEPS))


@dataclass
class SpoilFile:
    """An observer that damages a file of a checkpoint at the beginning of step `BAD`."""

    path: Path

    def at(self, point: str, step: int) -> None:
        if (point, step) == ("data", BAD):
            raw = bytearray(self.path.read_bytes())
            raw[-1] ^= 1
            self.path.write_bytes(raw)

    def waits(self, what: str | None) -> None:
        return None


def train_spoiling(communicator: Communicator, recipe: Recipe, fault: Fault, path: Path) -> Ending:
    if communicator.rank == 0:
        communicator.monitor.observers.append(SpoilFile(path))
    return train(communicator, recipe, fault)


def test_a_checkpoint_found_damaged_on_the_way_back_is_told_and_set_aside(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    recipe = recipe_in(tmp_path, "data", checkpoint__every=1, checkpoint__keep=9)
    file = tmp_path / "checkpoints" / "step-00000003" / "rank-00001.safetensors"
    found = run("simulated", 2, train_spoiling, recipe, Fault("exp_avg"), file)
    assert_same_bits(found, straight("simulated", "data", STEPS))
    (entry,) = found[0].damaged
    assert found[1].damaged == [entry]
    assert (entry["checkpoint"], entry["used"]) == ("step-00000003", "step-00000002")
    assert "rank-00001.safetensors does not match its hash" in entry["problem"]
    assert verify(tmp_path / "checkpoints" / entry["set_aside"]) != []
    assert sum("step-00000003 cannot be used" in record.getMessage() for record in caplog.records) == 1
    assert found[0].saved == [f"step-{step:08}" for step in range(1, STEPS + 1)]  # step 3 is there again, whole


def test_nothing_to_go_back_to_is_said(tmp_path: Path) -> None:
    found = runs("simulated", recipe_in(tmp_path, "data"), Fault("exp_avg"))
    assert "rank 1: exp_avg of " in found[0].error
    assert "there is no checkpoint to go back to; give a smaller checkpoint.every" in found[0].error


def test_memory_that_fails_again_and_again_ends_the_run(tmp_path: Path) -> None:
    """One forward pass a step: a second flip of the bit would undo the first."""
    recipe = recipe_in(tmp_path, "data", checkpoint__every=2, checkpoint__keep=9, guard__limit=2, train__micro_batch=2)
    found = runs("simulated", recipe, Fault("exp_avg", always=True))
    assert found[0].guard["rolled_back"] == 2
    assert "replace that hardware" in found[0].error


def test_without_checks_and_audits_the_same_flips_go_unseen(tmp_path: Path) -> None:
    """So the tests above see what the checks do, not luck."""
    off = {"guard__check_every": 0, "guard__audit_every": 0}
    for fault in (gradient(), Fault("exp_avg"), Fault("copy")):
        found = runs("simulated", recipe_in(tmp_path / fault.where, "data", **off), fault)
        with pytest.raises(AssertionError, match="rank 0"):
            assert_same_bits(found, straight("simulated", "data", STEPS))
        assert found[0].error == ""


def test_checks_and_audits_come_in_the_steps_that_were_asked_for(tmp_path: Path) -> None:
    found = runs("simulated", recipe_in(tmp_path, "data", guard__audit_every=3))
    assert [line["step"] for line in found[0].lines if line.get("attempts") == 2] == [3, 6]
    assert_same_bits(found, straight("simulated", "data", STEPS))

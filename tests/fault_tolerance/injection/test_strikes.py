"""Every kind of fault does what it says, at its point, once in a run however often the run is started."""

import json
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from bagualu.comm.errors import CommunicationError
from bagualu.comm.monitor import Monitor, Phase
from bagualu.fault_tolerance.checkpoint.layout.directory import list_checkpoints
from bagualu.fault_tolerance.checkpoint.layout.durable import DISK
from bagualu.fault_tolerance.checkpoint.reading.inspect import verify
from bagualu.fault_tolerance.injection.fault import ProcessKilled
from bagualu.fault_tolerance.injection.fault_target import flip_bit
from bagualu.fault_tolerance.injection.kinds import Kill, PlannedError, Slow
from bagualu.fault_tolerance.injection.observer import PlannedFaults
from bagualu.fault_tolerance.injection.plan import parse
from bagualu.fault_tolerance.injection.record import Record
from bagualu.fault_tolerance.injection.slowness import Slowness
from bagualu.trainer.recipe.config import Recipe
from tests.harness import run
from tests.parity import small_recipe
from tests.standing import assert_same_run, assert_stood, go_on

STEPS = 6


def recipe_in(folder: Path, *faults: str, **changes: object) -> Recipe:
    defaults: dict[str, object] = {
        "run__dir": str(folder), "train__steps": STEPS, "log__progress": "off", "checkpoint__every": 2, "parallel__data": 2,
        "parallel__pipeline": 2, "faults": list(faults), "train__validation_sequences": 0,
        "data__global_batch": 4, "model__layers": 2,
    }  # fmt: skip
    return small_recipe(**{**defaults, **changes})


def start(recipe: Recipe) -> dict[str, Any]:
    return run("simulated", recipe.world_size(), go_on, recipe)[0]


def strikes(folder: Path) -> list[dict[str, Any]]:
    return Record(folder / "faults.jsonl").strikes()


@pytest.fixture(scope="module")
def reference(undisturbed: Callable[[Recipe, str], Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return undisturbed(recipe_in(tmp_path_factory.mktemp("unused")), "simulated")


@pytest.mark.parametrize("point", ["data", "forward", "backward", "reduce", "agree", "optimizer", "write", "commit", "prune"])
def test_a_kill_at_every_point_is_survived_to_the_bit(tmp_path: Path, reference: Path, point: str) -> None:
    recipe = recipe_in(tmp_path, f"kill@step=5:rank=3:at={point}")
    with pytest.raises(ProcessKilled, match="planned: kill@step="):
        start(recipe)
    recipe.checkpoint.resume = True
    start(recipe)
    assert_stood(tmp_path, reference, 2)
    assert [parse(strike["fault"]) for strike in strikes(tmp_path)] == [parse(fault) for fault in recipe.faults]


def test_kills_while_resuming_are_survived_to_the_bit(tmp_path: Path, reference: Path) -> None:
    points = [phase for phase in Phase if phase.activity == "start" and phase is not Phase.FETCH]
    recipe = recipe_in(tmp_path, "kill@step=5:rank=0", *(f"kill@step=0:rank=1:at={point}" for point in points))
    for _ in recipe.faults:
        with pytest.raises(ProcessKilled):
            start(recipe)
        recipe.checkpoint.resume = True
    start(recipe)
    assert_stood(tmp_path, reference, 2)


def test_faults_strike_once_each_in_the_order_of_their_steps(tmp_path: Path, reference: Path) -> None:
    plan = ["exception@step=3:rank=1", "kill@step=2:rank=0:at=data", "kill@step=3:rank=1", "kill@step=3:rank=1"]
    recipe = recipe_in(tmp_path, *plan)
    for expected in (ProcessKilled, PlannedError, ProcessKilled, ProcessKilled):
        with pytest.raises(expected):
            start(recipe)
        recipe.checkpoint.resume = True
    start(recipe)
    assert_stood(tmp_path, reference, 2)
    assert [parse(strike["fault"]) for strike in strikes(tmp_path)] == [parse(plan[index]) for index in (1, 0, 2, 3)]


def test_what_struck_is_durable_before_it_strikes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    monkeypatch.setattr(Kill, "strike", lambda fault, scene: seen.append((tmp_path / "faults.jsonl").read_text()))
    start(recipe_in(tmp_path, "kill@step=2"))
    (line,) = seen
    assert json.loads(line)["fault"] == "kill@step=2"


def test_a_stopped_rank_holds_the_others_up_and_goes_on(tmp_path: Path, reference: Path) -> None:
    started = time.monotonic()
    start(recipe_in(tmp_path, "stop@step=3:rank=1:seconds=0.6"))
    assert time.monotonic() - started > 0.6
    assert_stood(tmp_path, reference, 2)


def test_a_slow_rank_changes_nothing_but_the_time(tmp_path: Path, reference: Path) -> None:
    start(recipe_in(tmp_path, "slow@step=2:rank=1:steps=2:factor=4"))
    assert_stood(tmp_path, reference, 2)


class Clock:
    """Stands for the module `time`."""

    now = 0.0

    def monotonic(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds


def test_slowness_multiplies_what_is_computed_not_what_is_waited(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock()
    monkeypatch.setattr("bagualu.fault_tolerance.injection.slowness.time", clock)
    monitor = Monitor()
    monitor.step = 3

    class Here:
        rank = 0

    scene: Any = Here()
    scene.monitor = monitor
    Slow(3, steps=2, factor=3.0).strike(scene)
    (slowness,) = monitor.observers
    assert isinstance(slowness, Slowness)

    slowness.waits(None)
    clock.now += 1.0
    slowness.at(Phase.BACKWARD, 4)
    assert clock.now == 3.0
    slowness.waits("all_reduce in fold")
    clock.now += 1.0
    slowness.waits(None)
    slowness.at(Phase.REDUCE, 4)
    assert clock.now == 4.0
    clock.now += 1.0
    slowness.at(Phase.DATA, 5)
    assert clock.now == 5.0, "it is over"


def test_corruption_flips_one_bit_of_the_newest_checkpoint(tmp_path: Path) -> None:
    start(recipe_in(tmp_path, "corrupt@step=5", train__steps=5, checkpoint__keep=3, checkpoint__asynchronous=False))
    (strike,) = strikes(tmp_path)
    assert "of step-00000004/rank-" in strike["did"]
    assert [path.name for path in list_checkpoints(tmp_path / "checkpoints") if verify(path)] == ["step-00000004"]


def test_corruption_without_a_checkpoint_says_so(tmp_path: Path) -> None:
    start(recipe_in(tmp_path, "corrupt@step=1", "corrupt@step=1:what=replica", train__steps=2))
    assert [strike["did"] for strike in strikes(tmp_path)] == ["there is no checkpoint yet", "there is no replica yet"]


def test_a_link_that_is_down_fails_or_hangs_every_communication_of_the_rank(tmp_path: Path) -> None:
    with pytest.raises(CommunicationError, match="the link is down, planned: drop_link@step=3:rank=2"):
        start(recipe_in(tmp_path / "raise", "drop_link@step=3:rank=2"))
    with pytest.raises(CommunicationError, match="has waited 2"):
        run_for(2.0, recipe_in(tmp_path / "block", "drop_link@step=3:rank=2:how=block"))


def run_for(timeout_seconds: float, recipe: Recipe) -> None:
    from bagualu.comm import simulated

    simulated.run(recipe.world_size(), lambda communicator: go_on(communicator, recipe), timeout_seconds)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_a_flipped_bit_gives_another_finite_number(dtype: torch.dtype) -> None:
    for value in (0.0, 1.0, -3.7, 1e-3):
        cell = torch.tensor([value], dtype=dtype)
        flip_bit(cell)
        assert math.isfinite(cell.item())
        assert cell.item() != torch.tensor([value], dtype=dtype).item()
        flip_bit(cell)
        assert cell.item() == torch.tensor([value], dtype=dtype).item()


def test_a_disk_is_full_for_as_many_writes_as_planned(tmp_path: Path) -> None:
    DISK.refuse(2, "planned: this")
    for _ in range(2):
        with pytest.raises(OSError, match="No space left"):
            DISK.check()
    DISK.check()


def test_a_full_disk_loses_one_save_and_no_more(tmp_path: Path, reference: Path) -> None:
    start(recipe_in(tmp_path, "full_disk@step=3"))
    assert [path.name for path in list_checkpoints(tmp_path / "checkpoints")] == ["step-00000002", "step-00000006"]
    assert "No space left on device" in (tmp_path / "metrics.jsonl").read_text()
    assert_stood(tmp_path, reference, 2)


@pytest.mark.parametrize("fault", ["nan@step=3:rank=1", "nan@step=3:rank=2"])
def test_a_nan_in_one_ranks_gradient_is_computed_again(tmp_path: Path, reference: Path, fault: str) -> None:
    start(recipe_in(tmp_path, fault))
    assert_stood(tmp_path, reference, 2)
    (strike,) = strikes(tmp_path)
    assert strike["did"].startswith("element 0 of the gradient of ")
    (line,) = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines() if "cause" in line]
    assert (line["step"], line["attempts"]) == (3, 2)
    totals = json.loads((tmp_path / "summary.json").read_text())["ledger"]
    assert totals["lost"] > 0, "the first attempt"


@pytest.mark.parametrize("what", ["weight", "master", "moment", "gradient"])
def test_a_flipped_bit_changes_the_run_unless_somebody_looks(tmp_path: Path, reference: Path, what: str) -> None:
    recipe = recipe_in(tmp_path, f"flip@step=3:rank=1:what={what}", guard__check_every=0, guard__on_nonfinite="skip",
                       guard__on_spike="skip")  # fmt: skip
    start(recipe)
    with pytest.raises(AssertionError):
        assert_same_run(tmp_path, reference)


@pytest.mark.parametrize("what", ["weight", "master", "moment", "gradient"])
def test_a_flipped_bit_is_found_where_somebody_looks(tmp_path: Path, reference: Path, what: str) -> None:
    recipe = recipe_in(tmp_path, f"flip@step=4:rank=1:what={what}", guard__check_every=1, guard__audit_every=1)
    start(recipe)
    assert_stood(tmp_path, reference, 2)


def test_only_its_own_rank_and_point_are_struck(tmp_path: Path) -> None:
    scene: Any = type("Here", (), {"rank": 1})()
    faults = PlannedFaults([Kill(3, 1), Kill(3, 0), Kill(3, 1, "data")], scene, Record(tmp_path / "faults.jsonl"))
    assert faults.ahead == [Kill(3, 1), Kill(3, 1, "data")]
    faults.at(Phase.BACKWARD, 2)
    faults.at(Phase.FORWARD, 3)
    assert faults.ahead == [Kill(3, 1), Kill(3, 1, "data")]


def test_frozen_parameters_are_passed_over_and_a_rank_without_others_is_spared(tmp_path: Path) -> None:
    """Pipeline rank 0 (ranks 0 and 1) has nothing but frozen parameters, rank 1 the first norm of its layer frozen."""
    names = ("embedding.weight", "layers.0.*", "layers.1.attention_norm.weight")
    plan = ["flip@step=2:rank=0:what=gradient", "flip@step=3:rank=0:what=moment", "flip@step=4:rank=0:what=master",
            "nan@step=5:rank=2"]  # fmt: skip
    groups = [{"pattern": name, "frozen": True} for name in names]
    summary = start(recipe_in(tmp_path, *plan, optim__groups=groups, train__dtype="bfloat16"))
    assert summary["ended"] == "done"
    did = [strike["did"] for strike in strikes(tmp_path)]
    assert did[:3] == ["nothing, because every norm of this rank is frozen", "nothing, because this rank has no moment",
                       "nothing, because this rank has no master"]  # fmt: skip
    assert did[3] == "element 0 of the gradient of layers.1.feed_forward_norm.weight"

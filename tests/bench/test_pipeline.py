"""What the benchmark of pipelines makes of its runs is right; and its ranks that sleep train like others."""

import subprocess
import sys
from pathlib import Path

import psutil
import pytest

sys.path.insert(0, str(Path(__file__).parent))  # the benchmarks are programs, not an installed package

from contest import many_ranks, slowed
from contest.bagualu import overrides
from contest.bubbles import row
from contest.duty import Slowed
from contest.entry import parse
from contest.runs import Ended
from contest.sleeping import Sleepers, Slow

from bagualu.parallel.pipeline.registry import FAMILIES, SCHEDULES, compute_schedule
from bagualu.parallel.pipeline.schedules.formula import Size
from bagualu.parallel.pipeline.timeline import per_kind, simulate


def test_a_schedule_is_a_contestant() -> None:
    entry = parse("bagualu-zb_h1", cores=2)
    assert (entry.name, entry.axis) == ("bagualu-zb_h1@2x1", "pipeline")
    words = overrides(entry, "bench_dense")
    assert {"parallel.pipeline=2", "parallel.schedule=zb_h1", "parallel.balance=measured", "train.micro_batch=auto"} <= set(words)
    assert parse("bagualu-zb_h1-compiled@1x1", cores=2).compiled
    with pytest.raises(ValueError, match="no variant 'zb_h9'"):
        parse("bagualu-zb_h9", cores=2)


@pytest.mark.parametrize("name", SCHEDULES)
def test_a_step_that_ran_as_planned_waits_as_planned(name: str) -> None:
    schedule = compute_schedule(name, 4, 8)
    whole = "W" not in {str(action.kind) for actions in schedule.actions for action in actions}
    line = simulate(schedule, per_kind(1, 2 if whole else 1, 0 if whole else 1))
    passes = [
        {"rank": rank, "kind": str(span.action.kind), "micro_batch": span.action.micro_batch, "stage": span.action.stage,
         "start": float(span.start), "end": float(span.end)}
        for rank, spans in enumerate(line.ranks) for span in spans
    ]  # fmt: skip
    found = row(name, schedule, [passes])
    assert found["measured"] == pytest.approx(float(line.own_bubble))
    assert found["planned"] == pytest.approx(float(line.own_bubble))
    published = FAMILIES[name].formula.share(Size(4, schedule.placement.chunks, 8))
    if published is not None and not whole:
        assert found["formula"] == pytest.approx(float(published))


def test_the_phases_of_a_run_whose_layers_move() -> None:
    times = [9.0, 1.0, 1.1, 5.0, 2.0, 2.2, 7.0, 1.5, 1.4]
    records = [{"step_seconds": seconds} for seconds in times]
    records[5] |= {"layers_of_stages": [6, 2], "move_seconds": 0.5}
    found = slowed.phases(Ended(records, {}, []), [4, 4], warmup=1, slow_from=3)
    assert [(one["phase"], one["layers"], one["seconds"]) for one in found] == [
        ("before", "4,4", [1.0, 1.1]), ("slow", "4,4", [2.0, 2.2]), ("moved", "6,2", [7.0, 1.5, 1.4]),
    ]  # fmt: skip
    static = slowed.row("static", "slow", [6, 2], [1.0])
    ratios = {one["phase"]: one["x best static"] for one in slowed.with_ratio(slowed.merged([*found, static])) if one["moves"]}
    assert ratios == {"moved": 1.5}


def test_a_slowed_process_goes_on_afterwards() -> None:
    child = subprocess.Popen([sys.executable, "-c", "import sys; sys.stdin.read()"], stdin=subprocess.PIPE)
    process = psutil.Process(child.pid)
    seen = set()
    try:
        with Slowed(child.pid, 0.5, period_seconds=0.002):
            while psutil.STATUS_STOPPED not in seen:
                seen.add(process.status())
        assert process.status() != psutil.STATUS_STOPPED
    finally:
        child.communicate(timeout=60)
    with Slowed(child.pid, 0.5):
        pass  # one that has ended is no error


@pytest.mark.parametrize("schedule", ["1f1b", "zb_v"])
def test_ranks_that_sleep_train(tmp_path: Path, schedule: str) -> None:
    words = ["parallel.pipeline=2", "model.layers=4", "data.global_batch=4", "train.steps=3", f"parallel.schedule={schedule}"]
    sleepers = Sleepers(1e-4, 1e-4, 1e-4, Slow(1, 2, 2.0))
    run = many_ranks.train(words, sleepers, tmp_path / "run")
    assert run.summary["ended"] == "done"
    assert len(run.step_seconds) == 3
    assert {one["kind"] for one in run.passes} == ({"F", "I", "W"} if schedule == "zb_v" else {"F", "B"})

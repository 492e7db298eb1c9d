"""`bagualu train` with other engines, as processes: a rank is killed and the run goes on, with fewer ranks too; another launch goes
on with another engine on more ranks or fewer."""

import re
import sys

import numpy as np
import pytest

from tests.launch.survival import MOST_LOST, SMALL, small
from tests.standing import assert_same_samples, assert_stood, figures

LINUX = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
pytestmark = [LINUX, pytest.mark.timeout(300)]
SLOW = pytest.mark.slow
WORDS = ["train.steps=7", "checkpoint.every=2"]


def on(engine, stage):
    dtype = ["train.dtype=float32"] if engine == "deepspeed" else []
    return [f"parallel.engine={engine}", f"parallel.zero={stage}", *dtype]


ENGINES = [("fsdp", 3), *(pytest.param(*kind, marks=SLOW) for kind in (
    ("native", 2), ("native", 3), ("deepspeed", 1), ("deepspeed", 2), ("deepspeed", 3)
))]  # fmt: skip


@pytest.mark.parametrize(("engine", "stage"), ENGINES)
def test_a_killed_rank_leaves_the_run_as_it_would_have_been(start, undisturbed, tmp_path, engine, stage):
    words = [*WORDS, "parallel.data=2", *on(engine, stage)]
    run = start(*SMALL, *words, "run.name=kill-1-4-reduce", "restart.backoff_seconds=0", entrypoint="faulty:train")
    code, _, err = run.end(150)
    assert code == 0, err
    assert re.search(r"bagualu: rank 1 failed, step 4.*SIGKILL.*; restart 1 of ", err), err
    assert_stood(run.folder, undisturbed(small(tmp_path / "unused", *words), "gloo"), MOST_LOST)


FOUR = [*WORDS, "parallel.data=4"]
FAILING = ["run.name=raise-3-4-forward", "restart.elastic=true", "restart.backoff_seconds=0"]


@pytest.mark.slow
@pytest.mark.parametrize(("engine", "stage"), [("native", 3), ("fsdp", 3), ("deepspeed", 1), ("deepspeed", 2), ("deepspeed", 3)])
def test_an_elastic_run_goes_on_without_a_rank(start, undisturbed, tmp_path, engine, stage):
    run = start(*SMALL, *FOUR, *on(engine, stage), *FAILING, entrypoint="faulty:train")
    code, _, err = run.end(200)
    assert code == 0, err
    assert "restart 2 of 3 without rank 3" in err
    assert "going on with 2 ranks of 3 workers: " in err
    reference = undisturbed(small(tmp_path / "unused", *FOUR, *on(engine, stage)), "gloo")
    if engine == "deepspeed":
        assert_same_in_float32(run.folder, reference)
    else:
        assert_stood(run.folder, reference, MOST_LOST, exact=False)


def assert_same_in_float32(folder, reference):
    ours, theirs = figures(folder), figures(reference)
    assert [line["step"] for line in ours] == [line["step"] for line in theirs]
    for key in ("loss", "grad_norm"):
        np.testing.assert_allclose([line[key] for line in ours], [line[key] for line in theirs], rtol=2e-5, err_msg=key)
    assert_same_samples(folder, reference)


CHAINS = [
    [("fsdp", 3, 2), ("native", 3, 4), ("fsdp", 3, 4), ("native", 0, 1), ("fsdp", 3, 2)],
    [("fsdp", 3, 2), ("deepspeed", 3, 4), ("deepspeed", 1, 2), ("fsdp", 3, 4), ("native", 2, 2)],
]


@pytest.mark.slow
@pytest.mark.parametrize("chain", CHAINS, ids=["float64", "float32"])
def test_launches_with_other_engines_and_ranks_go_on_with_one_run(start, undisturbed, tmp_path, chain):
    common = [] if chain is CHAINS[0] else ["train.dtype=float32"]
    for number, (engine, stage, ranks) in enumerate(chain, 1):
        words = [f"parallel.data={ranks}", *on(engine, stage), *common, f"train.steps={2 * number}", "checkpoint.every=2"]
        words += ["optim.schedule=constant", f"checkpoint.resume={str(number > 1).lower()}"]
        run = start(*SMALL, *words, entrypoint="faulty:train")
        code, _, err = run.end(150)
        assert code == 0, err
    words = [*common, f"train.steps={2 * len(chain)}", "checkpoint.every=2", "optim.schedule=constant", "parallel.data=1"]
    assert_same_in_float32(run.folder, undisturbed(small(tmp_path / "unused", *words), "gloo"))

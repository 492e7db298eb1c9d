"""A disk that is full for a while costs a run its saves and some steps, whatever else writes there; then it goes on."""

import json
import time
from pathlib import Path

import pytest

from bagualu.trainer.recipe.compose import load_recipe
from tests.conftest import Undisturbed
from tests.launch.warm import run_as_root
from tests.leftovers import Leftovers
from tests.mounts import can_mount
from tests.standing import assert_stood
from tests.trainer.full_disk import FAILS_IN

HERE = Path(__file__).parent


@pytest.mark.skipif(not can_mount(), reason="needs `unshare -rm` with mounts (root, or user namespaces)")
@pytest.mark.parametrize(
    ("backend", "words"),
    [
        ("simulated", []),
        *(
            pytest.param("gloo", words, marks=pytest.mark.slow)
            for words in (
                [], ["parallel.zero=3"], ["parallel.engine=fsdp"],
                *(["parallel.engine=deepspeed", f"parallel.zero={stage}", "train.dtype=float32"] for stage in (1, 2, 3)),
            )
        ),
    ],
    ids=lambda value: " ".join(value[:2]) if isinstance(value, list) else value,
)  # fmt: skip
def test_a_run_outlives_a_full_disk_even_when_it_is_started_again_there(
    tmp_path: Path, undisturbed: Undisturbed, leftovers: Leftovers, backend: str, words: list[str]
) -> None:
    started = time.monotonic()
    arguments = [str(tmp_path), backend, *words]
    done = run_as_root("tests.trainer.full_disk", arguments, "mounts", leftovers.environment, HERE)
    seconds = time.monotonic() - started
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "found.json").read_text())
    assert found["code"] == 0, done.stderr
    assert found["starts"] == [4, 4]
    for said in (
        "ledger.jsonl cannot be written (No space left on device); its lines are kept",
        "metrics.jsonl cannot be written (No space left on device); its lines are kept",
        "step 6 was not saved: rank ",
        "RuntimeError: while the disk was full; restart 1 of 3",
        "restart 3 of 3 in 0 s, from step-00000004",
    ):
        assert said in done.stderr, done.stderr
    assert found["failures"] == [26, 0, 0]
    assert found["checkpoints"] == ["step-00000028", "step-00000030"]
    assert found["problems"] == [[], []]
    reference = undisturbed(load_recipe(tmp_path / "run" / "config.yaml"), backend)
    assert_stood(tmp_path / "run", reference, FAILS_IN - 4, seconds)  # nothing was saved since step 4
    # Another run, that finds the disk full when it begins.
    assert found["refused"] == 1
    assert done.stderr.splitlines()[-1].startswith("bagualu: failed: No space left on device")

"""Skips what this machine cannot run, and only that: gpu without a GPU, slurm without SLURM. Temporary files lie in memory, and a
test that writes into the folder that it was started in is an error. What must not run beside each other under `-n` is said here."""

import gc
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import hypothesis
import pytest
import torch
from xdist.scheduler import LoadScopeScheduling

from bagualu.fault_tolerance.config import CheckpointConfig, RestartConfig
from bagualu.launch.workers import threads
from bagualu.trainer import run as whole_run
from bagualu.trainer.process import environment
from bagualu.trainer.recipe.config import Recipe
from tests import harness
from tests.leftovers import Leftovers
from tests.standing import go_on

MEMORY = Path("/dev/shm")
ENOUGH_BYTES = 2 * 2**30
_START_LAUNCHERS = (
    "tests/launch/",
    "tests/fault_tolerance/test_soak.py",
    "tests/trainer/test_full_disk.py",
    "tests/trainer/test_tiny_run.py",
)
# Of these folders, but nothing of theirs starts a launcher.
_START_NONE = (
    "tests/launch/test_cli.py",
    *(f"tests/launch/verbs/test_{name}.py" for name in ("checkpoint", "plan", "schedule", "simulate")),
    *(f"tests/launch/workers/test_{name}.py" for name in ("worker_failures", "elastic_layout", "restart_policy")),
)


def pytest_configure(config: pytest.Config) -> None:
    if not config.option.basetemp and os.access(MEMORY, os.W_OK) and shutil.disk_usage(MEMORY).free > ENOUGH_BYTES:
        # Every save waits for the disk several times over, and a rented disk answers when it likes.
        config.option.basetemp = tempfile.mkdtemp(prefix="bagualu-tests-", dir=MEMORY)
        config.add_cleanup(lambda: shutil.rmtree(config.option.basetemp, ignore_errors=True))
    if sys.dont_write_bytecode and not sys.pycache_prefix:
        # So that not each of hundreds of processes compiles all that it imports; and nothing is written beside the sources.
        folder = tempfile.mkdtemp(prefix="bagualu-bytecode-")
        config.add_cleanup(lambda: shutil.rmtree(folder, ignore_errors=True))
        config.add_cleanup(lambda: setattr(sys, "dont_write_bytecode", True))  # first: the last cleanup that is added runs first
        os.environ["PYTHONPYCACHEPREFIX"] = sys.pycache_prefix = folder
        os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
        sys.dont_write_bytecode = False
    hypothesis.settings.register_profile("untimed", deadline=None)  # a busy machine is no failure
    hypothesis.settings.load_profile("untimed")
    os.environ.setdefault(environment.CUBLAS, environment.REPEATABLE[0])  # as a worker's launcher does
    torch.set_num_threads(1)  # the tensors here are tiny: more threads only wait for each other
    gc.set_threshold(harness.OBJECTS)


class _Lanes(LoadScopeScheduling):
    """A module's tests follow each other in one process; so do all that start launchers with workers, whose deadlines are meant for
    one at a time, and of which each tidies up what another has left on this machine."""

    def _split_scope(self, nodeid: str) -> str:
        alone = nodeid.startswith(_START_LAUNCHERS) and not nodeid.startswith(_START_NONE)
        return "launchers" if alone else nodeid.partition("::")[0]


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> _Lanes:
    return _Lanes(config, log)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    missing = {
        "gpu": None if torch.cuda.is_available() else "needs an NVIDIA GPU",
        "slurm": None if shutil.which("slurmctld") else "needs SLURM (slurmctld on PATH)",
    }
    for item in items:
        for marker, reason in missing.items():
            if reason and item.get_closest_marker(marker):
                item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture
def leftovers(tmp_path: Path) -> Iterator[Leftovers]:
    """Asserts that what the test does, and what it starts with `leftovers.environment`, leaves nothing behind; fixtures that start
    something end it first."""
    with leaving_nothing(tmp_path) as watch:
        yield watch


@contextmanager
def leaving_nothing(folder: Path) -> Iterator[Leftovers]:
    """Asserts the same of what is done within the context, with temporary files in `folder`."""
    harness.prepare()
    temporary = folder / "temporary"
    temporary.mkdir()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("tempfile.tempdir", str(temporary))
        watch = Leftovers(temporary)
        yield watch
        watch.assert_none()


Undisturbed = Callable[[Recipe, str], Path]


@pytest.fixture(scope="session")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Undisturbed:
    """undisturbed(recipe, backend) -> the directory of the same run with nothing happening to it, for `assert_stood`.

    Trained once a session, whoever asks: where it lies, what it saves when and what it would do after a failure is left out.
    """
    folders: dict[str, Path] = {}

    def of(recipe: Recipe, backend: str) -> Path:
        alone = replace(
            recipe, run=replace(recipe.run, dir="", name="undisturbed"), faults=[], restart=RestartConfig(), launch=Recipe().launch,
            checkpoint=CheckpointConfig(every=0), comm=replace(recipe.comm, timeout_seconds=harness.TIMEOUT_SECONDS),
            log=replace(recipe.log, progress="off", every=1000),
        )  # fmt: skip
        known = f"{backend} {alone}"
        if known not in folders:
            folder = tmp_path_factory.mktemp("undisturbed")
            alone.run.dir = str(folder)
            harness.run(backend, alone.world_size(), go_on, alone)
            folders[known] = folder
        return folders[known]

    return of


@pytest.fixture(autouse=True, scope="module")
def _quick_collections() -> None:
    """A garbage collection need not walk through all that is imported and collected by then. That takes a second, and each of
    four ranks that are threads asks for one when layers move."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True, scope="session")
def _no_work_for_nothing() -> Iterator[None]:
    """Ranks that no launcher has started do not measure what their matrix products reach, which takes each of them 0.4 s a run. A
    single rank that is a thread computes with one thread. Two of them, where another test runs on the other core, wait for each
    other at every operation, which takes several times as long."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(whole_run, "matmul_ceiling", harness.known_ceiling)
        patch.setattr(threads, "environment", SimpleNamespace(threads=lambda launch, ranks: launch.threads or 1))
        yield


@pytest.fixture(autouse=True)
def _nothing_beside_the_sources() -> Iterator[None]:
    """A path that was meant as a URL, or the other way round, becomes a folder right here, and is committed one day."""
    here, before = Path.cwd(), set(os.listdir())
    yield
    left = set(os.listdir(here)) - before
    left = {name for name in left if not name.startswith(".")}
    assert not left, f"left behind in {here}: {sorted(left)}; write into tmp_path (with -n also by a test beside this one)"

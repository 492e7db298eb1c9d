"""Runs the command `bagualu` with a stand-in for the trainer (stand_in.py), and watches what becomes of its processes."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from bagualu.trainer.process.failure import FAILED, LOOPED
from tests.launch.warm import Launcher
from tests.leftovers import Leftovers
from tests.standing import assert_names_rank_phase_and_cause

# What started the tests may have them, and what they start, ignore these: a shell Ctrl-C (`&`), nohup a hang-up.
_COMMAND = """
import signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGHUP, signal.SIG_DFL)
from bagualu.launch.cli import main
sys.exit(main(entrypoint='{}'))
"""


PATHS = f"{Path(__file__).parent}:{Path(__file__).parents[2]}"
"""Where entrypoints and what they share with the tests are found, by processes that start somewhere else."""


class Run:
    """A `bagualu train` under way, in a process group of its own and with Ctrl-C heard, as on a terminal."""

    def __init__(
        self,
        folder: Path,
        environment: Mapping[str, str],
        *overrides: str,
        stderr: int = subprocess.PIPE,
        entrypoint: str = "stand_in:train",
        cold: bool = False,
        module: str = "bagualu.launch.cli",
    ) -> None:
        """`cold`: with nothing imported yet, as people start it; `module`: whose `main` is run, where it is not."""
        self.folder = folder / "run"
        steps = [] if any("train.steps=" in word for word in overrides) else ["train.steps=100000"]
        # Whether to generate kernels for so many steps is found out by tracing the model, which takes seconds.
        functions = [] if any("train.compile=" in word for word in overrides) else ["train.compile=false"]
        words = ["train", "recipe=tiny", f"run.dir={self.folder}", *steps, *functions, *overrides]
        own = {**environment, "PYTHONPATH": PATHS}
        self.process: subprocess.Popen[str]
        if cold or sys.platform != "linux":
            self.process = subprocess.Popen(
                [sys.executable, "-c", _COMMAND.format(entrypoint), *words], text=True, stdout=subprocess.PIPE, stderr=stderr,
                cwd=folder, start_new_session=True, env=own,
            )  # fmt: skip
        else:
            self.process = Launcher(words, entrypoint, module, stderr=stderr, cwd=folder, env=own)

    def started(self, ranks: int = 4, step: int = 2) -> list[dict[str, Any]]:
        """What each rank says of itself, once all have started and `step` steps are done."""
        metrics = self.folder / "metrics.jsonl"
        _wait(lambda: metrics.exists() and len(metrics.read_text().splitlines()) >= step, self.process)
        return [json.loads((self.folder / f"rank-{rank}.json").read_text()) for rank in range(ranks)]

    def until(self, condition: Callable[[], bool]) -> None:
        """Wait for something while the launcher lives."""
        _wait(condition, self.process)

    def interrupt(self) -> None:
        """Ctrl-C: SIGINT to the whole process group."""
        os.killpg(self.process.pid, signal.SIGINT)

    def end(self, at_most_seconds: float = 60) -> tuple[int, str, str]:
        """Exit code, stdout and stderr. Whatever the test is about, after a failure the last line names rank, phase and cause."""
        out, err = self.process.communicate(timeout=at_most_seconds)
        if self.process.returncode in (FAILED, LOOPED):
            assert_names_rank_phase_and_cause(err.splitlines()[-1])
        return self.process.returncode, out, err or ""


@pytest.fixture
def gone() -> Callable[..., bool]:
    """gone(pids) -> whether all of the processes end within some seconds; gone(pids, within=2): within so many from now."""
    return _gone


def _gone(pids: list[int], within: float = 20.0) -> bool:
    """A test that is kept waiting itself, on a busy machine, still looks once, at what was to be gone by then."""
    deadline = time.monotonic() + within
    while any(_alive(pid) for pid in pids):
        if time.monotonic() > deadline:
            return False
        time.sleep(0.05)
    return True


def _alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def _wait(condition: Any, process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 120
    while not condition():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.fixture
def start(tmp_path: Path, leftovers: Leftovers) -> Iterator[Any]:
    """start(*overrides) -> Run; whatever is left of its process group is killed after the test, and then nothing may be left."""
    with starting(tmp_path, leftovers) as begin:
        yield begin


@contextlib.contextmanager
def starting(folder: Path, leftovers: Leftovers) -> Iterator[Callable[..., Run]]:
    """start(*overrides) -> Run in `folder`, as long as the context lasts."""
    runs: list[Run] = []

    def begin(*overrides: str, **options: Any) -> Run:
        runs.append(Run(folder, leftovers.environment, *overrides, **options))
        return runs[-1]

    try:
        yield begin
    finally:
        for run in runs:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(run.process.pid, signal.SIGKILL)
            run.process.wait()

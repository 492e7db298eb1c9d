"""The harness' side of a contestant: start and warm up, `measure` in every round, `close` at the end."""

import json
import os
import socket
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from contest.entry import Entry
from contest.environment import environment

BENCH = Path(__file__).resolve().parent.parent


@dataclass(frozen=True)
class Sample:
    """What one contestant did in one round."""

    step_seconds: list[float]
    """One entry per timed step: the slowest process' time."""
    cpu_seconds: list[float]
    """One per timed step: processor time of all processes, hardly disturbed by other work. Empty if not known."""
    peak_memory_bytes: int
    """Highest resident memory so far, summed over its processes."""


class Contestant(Protocol):
    """What the harness alternates between."""

    def measure(self, steps: int) -> Sample:
        """Run untimed, then `steps` timed steps. Raises RuntimeError that names the log when the program fails."""

    def close(self) -> None:
        """End every process."""


class Team:
    """The processes of one baseline, alive for the whole benchmark and blocked on stdin between rounds."""

    def __init__(
        self, entry: Entry, recipe: str, allocator: str, warmup: int, logs: Path, device: str, tensors: bool = False
    ) -> None:
        """Start the processes; the first turn begins with `warmup` untimed steps (compilation happens there). `tensors`: peaks are
        those of the tensors' bytes in the steps, not of the processes."""
        self.entry, self.untimed, self.log = entry, warmup, logs / f"{recipe}-{entry.name}.log"
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        command = [sys.executable, "-m", "contest.worker", "--framework", entry.program, "--precision", entry.variant,
                   "--recipe", recipe, "--processes", str(entry.processes), "--threads", str(entry.threads),
                   "--port", str(port), "--device", device, *(["--compiled"] if entry.compiled else []),
                   *(["--tensors"] if tensors else [])]  # fmt: skip
        variables = environment(entry.threads, allocator)
        variables["PYTHONPATH"] = os.pathsep.join(filter(None, (str(BENCH), variables.get("PYTHONPATH"))))
        with self.log.open("w", encoding="utf-8") as log:
            self.workers = [
                subprocess.Popen([*command, "--rank", str(rank)], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                                 stderr=log, text=True, bufsize=1, env=variables)
                for rank in range(entry.processes)
            ]  # fmt: skip

    def measure(self, steps: int) -> Sample:
        self._run(self.untimed)
        self.untimed = 1  # from now on: the others have emptied the caches
        return self._run(steps)

    def _run(self, steps: int) -> Sample:
        answers = []
        try:
            for worker in self.workers:
                assert worker.stdin is not None
                worker.stdin.write(json.dumps({"steps": steps}) + "\n")
        except BrokenPipeError:
            raise RuntimeError(f"{self.entry.name} failed, see {self.log}") from None
        for worker in self.workers:
            assert worker.stdout is not None
            line = worker.stdout.readline()
            if not line:
                raise RuntimeError(f"{self.entry.name} failed, see {self.log}")
            answers.append(json.loads(line))
        slowest = [max(times) for times in zip(*(answer["step_seconds"] for answer in answers), strict=True)]
        cpu = [sum(times) for times in zip(*(answer["cpu_seconds"] for answer in answers), strict=True)]
        return Sample(slowest, cpu, sum(answer["peak_memory_bytes"] for answer in answers))

    def close(self) -> None:
        for worker in self.workers:
            if worker.stdin is not None:
                worker.stdin.close()
        for worker in self.workers:
            try:
                worker.wait(timeout=30)
            except subprocess.TimeoutExpired:
                worker.kill()
                worker.wait()

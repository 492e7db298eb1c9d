"""What a lost rank costs, and what being ready for it costs.

    python -m tests.bench.recovery                      # kill -9 of one of 4 ranks, from memory and from storage in turns
    python -m tests.bench.recovery --replication        # time and memory of a replica, bench_dense_124m on 2 ranks

Recovery is the time from the kill to the end of the next step that had not been done before, of `bagualu train` with the recipe
tiny: noticed and workers gone, until `train` begins in the last new worker, until the state is back, until the step is done.
"""

import argparse
import json
import os
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from bagualu.comm.group import Communicator
from bagualu.comm.monitor import Monitor
from bagualu.trainer import run as whole_run
from bagualu.trainer.assemble import assemble
from bagualu.trainer.data.corpus import prepare
from bagualu.trainer.recipe.compose import compose
from bagualu.trainer.recipe.config import Recipe
from bagualu.trainer.recovery.replication import open_replication
from bagualu.trainer.recovery.saving import take_checkpoints
from bagualu.trainer.step import train_step
from tests.harness import run

KILL_AFTER = 12
"""Steps before the kill: the first ones are slow."""
_COMMAND = "import sys; from bagualu.launch.cli import main; sys.exit(main(entrypoint='tests.bench.recovery:observed'))"


class Diary:
    """Writes down when the rank came to which point."""

    def __init__(self, path: Path, monitor: Monitor) -> None:
        self.file = path.open("a", buffering=1)
        self.monitor = monitor

    def at(self, point: str, step: int) -> None:
        self.file.write(json.dumps({"time": time.time(), "point": point, "step": step, "pid": os.getpid()}) + "\n")

    def waits(self, what: str | None) -> None:
        return None


def observed(recipe: Recipe, communicator: Communicator, stop: Any, scratch: Path | None = None) -> dict[str, Any]:
    """The entrypoint of a worker that keeps a diary."""
    diary = Diary(Path(recipe.run.dir) / f"diary-{communicator.rank}.jsonl", communicator.monitor)
    diary.at("up", 0)
    communicator.monitor.observers.append(diary)
    return whole_run.train(recipe, communicator, stop, scratch)


def entries(folder: Path, rank: int) -> list[dict[str, Any]]:
    path = folder / f"diary-{rank}.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def recovery(source: str, every: int, ranks: int = 4) -> dict[str, Any]:
    """Seconds of one recovery, by part; `source` is memory or storage."""
    key = {"memory": "checkpoint.replica_every", "storage": "checkpoint.every"}[source]
    both = {"checkpoint.every": 0, "checkpoint.replica_every": 0, key: every}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        words = ["train", "recipe=tiny", f"run.dir={name}", "train.steps=100000", "log.progress=off", "train.validate_every=0"]
        words += [f"{key}={value}" for key, value in both.items()]
        launcher = subprocess.Popen([sys.executable, "-c", _COMMAND, *words], stderr=subprocess.PIPE, text=True)
        try:
            await_step(folder, KILL_AFTER, launcher)
            victim = entries(folder, random.randrange(ranks))[-1]["pid"]
            done, killed = steps_done(folder), time.time()
            os.kill(victim, signal.SIGKILL)
            await_step(folder, done + 1, launcher, since=killed)
            return parts_of(folder, killed, done, ranks)
        finally:
            launcher.send_signal(signal.SIGTERM)
            launcher.communicate(timeout=120)


def steps_done(folder: Path) -> int:
    """Steps whose successor has begun on rank 0."""
    return max((entry["step"] for entry in entries(folder, 0) if entry["point"] == "data"), default=1) - 1


def await_step(folder: Path, step: int, launcher: subprocess.Popen[str], since: float = 0.0) -> None:
    """Return when `step` is done, by workers that began after `since`."""
    deadline = time.monotonic() + 300
    while True:
        diary = entries(folder, 0)
        up = [entry["time"] for entry in diary if entry["point"] == "up"]
        if up and up[-1] > since and diary[-1]["step"] > step:
            return
        if launcher.poll() is not None or time.monotonic() > deadline:
            raise SystemExit(f"the run has not come to step {step}: {launcher.communicate()[1]}")
        time.sleep(0.02)


def parts_of(folder: Path, killed: float, done: int, ranks: int) -> dict[str, Any]:
    diaries = [[entry for entry in entries(folder, rank) if entry["time"] > killed] for rank in range(ranks)]
    lives = [diary[next(i for i, entry in enumerate(diary) if entry["point"] == "up") :] for diary in diaries]
    up = max(life[0]["time"] for life in lives)
    back = max(first(life, lambda entry: entry["point"] == "data")["time"] for life in lives)
    again = min(first(life, lambda entry: entry["point"] == "data")["step"] for life in lives)
    next_step = first(lives[0], lambda entry: entry["step"] == again + 1)["time"]
    caught_up = first(lives[0], lambda entry: entry["step"] > done + 1)["time"]
    return {
        "processes up": up - killed, "state back": back - up, "first step": next_step - back, "total": next_step - killed,
        "steps lost": done + 1 - again, "caught up after": caught_up - killed,
    }  # fmt: skip


def first(diary: Iterable[dict[str, Any]], condition: Any) -> dict[str, Any]:
    return next(entry for entry in diary if condition(entry))


def replication(communicator: Communicator, recipe: Recipe, folder: Path, per_node: int, rounds: int) -> dict[str, float]:
    """Seconds of a step and of a replica after it, and bytes of this rank's state."""
    scratch = folder / f"node-{communicator.rank // per_node}"
    scratch.mkdir(exist_ok=True)
    parts = assemble(recipe, communicator, prepare(recipe.data, recipe.model.vocab))
    kept = open_replication(parts, scratch, take_checkpoints(parts))
    assert kept is not None
    kept.replicas.start(None)
    steps, copies = [], []
    for step in range(rounds + 2):
        communicator.world.barrier()
        begin = time.perf_counter()
        train_step(parts, step)
        communicator.world.barrier()
        between = time.perf_counter()
        kept.after_step(step + 1)
        steps.append(between - begin)
        copies.append(time.perf_counter() - between)
    assert not kept.replicas.off
    own = sum(piece.tensor.nbytes for piece in parts.engine.pieces())
    held = sum(path.stat().st_size for path in scratch.rglob("*") if path.is_file())
    kept.replicas.remove()
    return {
        "step": statistics.median(steps[2:]), "replica": statistics.median(copies[2:]), "state bytes": own, "node bytes": held,
    }  # fmt: skip


def replications(ranks: int, rounds: int) -> list[dict[str, Any]]:
    recipe = compose(["recipe=bench_dense_124m", f"parallel.data={ranks}", "checkpoint.replica_every=1"])
    rows = []
    for nodes in (1, 2):
        with tempfile.TemporaryDirectory(dir="/dev/shm") as name:
            recipe.run.dir = f"{name}/run"
            answers = run("gloo", ranks, replication, recipe, Path(name), ranks // nodes, rounds)
        total = sum(answer["state bytes"] for answer in answers)
        step, seconds = (max(answer[key] for answer in answers) for key in ("step", "replica"))
        rows.append({
            "nodes": nodes, "step s": step, "replica s": seconds, "share of a step": seconds / step,
            "state MB": total / 1e6, "MB/s": total / 1e6 / seconds, "memory of a node MB": answers[0]["node bytes"] / 1e6,
        })  # fmt: skip
    return rows


def table(rows: list[dict[str, Any]]) -> str:
    lines = ["| " + " | ".join(rows[0]) + " |", "|" + "---|" * len(rows[0])]
    lines += ["| " + " | ".join(map(cell, row.values())) + " |" for row in rows]
    return "\n".join(lines)


def cell(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:,.3g}" if abs(value) < 1000 else f"{value:,.0f}"
    return str(value)


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--replication", action="store_true", help="time and memory of a replica instead of recovery")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--every", type=int, default=5, help="steps between replicas, and between checkpoints (default 5)")
    parser.add_argument("--json", type=Path, metavar="FILE")
    options = parser.parse_args(argv)
    if options.replication:
        rows = replications(2, options.rounds)
    else:
        sources = ("memory", "storage") * options.rounds
        rows = [{"state from": source, **recovery(source, options.every)} for source in sources]
    print(table(rows))
    if options.json:
        options.json.write_text(json.dumps(rows, indent=2))


if __name__ == "__main__":
    main(sys.argv[1:])

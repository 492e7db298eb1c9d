"""Ways to lose or mix checkpoints, each as a function that returns what went wrong; [] when nothing did.

The tests want []; test_mutants.py wants the opposite from an implementation that has been weakened.
"""

import contextlib
import os
import shutil
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from power import CALLS, Power, lay_out
from ranks import rows_of, run, save_fenced, save_while_training, tensors

from bagualu.comm.group import Group
from bagualu.fault_tolerance.checkpoint.layout.directory import latest, list_checkpoints
from bagualu.fault_tolerance.checkpoint.layout.format import CheckpointError
from bagualu.fault_tolerance.checkpoint.reading.inspect import verify
from bagualu.fault_tolerance.checkpoint.reading.load import Checkpoint
from bagualu.fault_tolerance.checkpoint.saving.fence import Fence
from bagualu.fault_tolerance.checkpoint.saving.save import Saver
from bagualu.fault_tolerance.checkpoint.saving.snapshot import Snapshot

LAGGARD_SECONDS = 0.3


def content_problems(path: Path) -> list[str]:
    """What is wrong with the checkpoint at `path`: every byte verified, every value that of its step."""
    problems = verify(path)
    if problems:
        return problems
    checkpoint = Checkpoint(path)
    for name, expected in tensors(checkpoint.step).items():
        out = torch.empty_like(expected)
        checkpoint.read(name, (0,) * out.dim(), out)
        if not torch.equal(out, expected):
            problems.append(f"{path}: {name} is not that of step {checkpoint.step}")
    return problems


def power_loss(folder: Path, patch: pytest.MonkeyPatch) -> list[str]:
    """Step 20 is saved in the background over step 10, keeping one; the power goes before each call, and right after it is saved.

    The shard of rank 1 takes its time to become durable, as on a slow node.
    """
    root = folder / "root"
    fence = Fence.take(root)
    save_fenced(fence, 10, 2)

    def before(call: str, args: tuple[Any, ...]) -> None:
        if call == "fsync" and os.readlink(f"/proc/self/fd/{args[0]}").endswith("rank-00001.safetensors"):
            deadline = time.monotonic() + LAGGARD_SECONDS
            while "step-00000020" not in power.state() and time.monotonic() < deadline:
                time.sleep(0.005)

    power = Power(root, patch, before)

    def one(group: Group) -> Any:
        saver = Saver(fence, group, keep=1)
        saved, _ = save_while_training(saver, 20, Snapshot())
        told = power.state()
        saver.close()
        return saved, told

    results = run(2, one)
    patch.undo()
    problems = [f"the save failed: {saved}" for saved, _ in results if isinstance(saved, Exception)]
    states = [(0, state) for state in power.states] + [(20, told) for _, told in results] + [(20, power.state())]
    reached = []
    for index, (least, state) in enumerate(states):
        copy = folder / f"power-{index}"
        lay_out(state, copy)
        newest = latest(copy)
        if newest is None:
            problems.append(f"{copy}: nothing is left")
            continue
        reached.append(Checkpoint(newest).step if not verify(newest) else -1)
        problems += content_problems(newest)
        if reached[-1] < least:
            problems.append(f"{copy}: step {least} was said to be saved, and step {reached[-1]} is what is there")
    if reached and (reached != sorted(reached) or set(reached) != {10, 20}):
        problems.append(f"old, then new, is not what came out: {reached}")
    return problems


def zombie(folder: Path, patch: pytest.MonkeyPatch) -> list[str]:
    """A save of step 20 is held up before each of its calls; then the run starts anew and saves step 30; then it wakes up."""
    problems: list[str] = []
    calls, woken = 0, False
    while not woken:
        root = folder / f"zombie-{calls}"
        found, woken = _zombie_at(root, calls, patch)
        problems += found
        shutil.rmtree(root)
        calls += 1
    if calls < 15:
        problems.append(f"the zombie made only {calls} calls")
    return problems


def _zombie_at(root: Path, n: int, patch: pytest.MonkeyPatch) -> tuple[list[str], bool]:
    """With the zombie held up before its n-th call; the problems, and whether it ended without coming to it."""
    old = Fence.take(root)
    save_fenced(old, 10)
    held, wake, count = threading.Event(), threading.Event(), [0]

    def watched(original: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            if threading.current_thread().name in ("zombie", "checkpoint-writer-7"):
                count[0] += 1
                if count[0] == n + 1:
                    held.set()
                    wake.wait(60)
            return original(*args, **kwargs)

        return call

    outcome: list[Any] = []

    def live() -> None:
        saver = Saver(old, Group("world", (7,), 0, None), keep=10)
        try:
            saver.start(20, rows_of(20, saver.group), {"step": 20})
            outcome.append(saver.conclude())
        except CheckpointError as error:
            outcome.append(error)
        saver.close()
        held.set()

    with patch.context() as context:
        for name in CALLS:
            context.setattr(os, name, watched(getattr(os, name)))
        thread = threading.Thread(target=live, name="zombie")
        thread.start()
        held.wait(60)
        problems, ended = _start_anew(root, wake, thread), bool(count[0] <= n)
    if [path.name for path in list_checkpoints(root)][1:-1] and not isinstance(outcome[0], Path):
        problems.append(f"call {n}: step 20 is there, and the zombie was told {outcome[0]}")
    return [f"call {n}: {problem}" for problem in problems], ended


def _start_anew(root: Path, wake: threading.Event, zombie: threading.Thread) -> list[str]:
    """The new start's life, and the zombie's end."""
    new = Fence.take(root)
    there = list_checkpoints(root)
    saved = save_fenced(new, 30, keep=10)
    wake.set()
    zombie.join(60)
    problems = [f"the new start could not save: {error}" for error in saved if isinstance(error, Exception)]
    expected = [*there, root / "step-00000030"]
    if list_checkpoints(root) != expected:
        problems.append(f"the zombie has committed: {list_checkpoints(root)} in place of {expected}")
    return problems + [problem for path in list_checkpoints(root) for problem in content_problems(path)]


def damage(folder: Path, patch: pytest.MonkeyPatch) -> list[str]:
    """A byte flipped in the middle of each tensor's data, in each header and in the manifest: found, before it is used."""
    root = folder / "root"
    (path,) = save_fenced(Fence.take(root), 10)
    problems = [f"undamaged, and yet: {problem}" for problem in verify(path)]
    for file in sorted(path.iterdir()):
        good = file.read_bytes()
        for at in range(3, len(good), 7):
            file.write_bytes(good[:at] + bytes([good[at] ^ 1]) + good[at + 1 :])
            with contextlib.suppress(CheckpointError, ValueError, KeyError, TypeError):
                if not verify(path):
                    problems.append(f"{file.name}: byte {at} was changed, and nobody noticed")
        file.write_bytes(good)
    return problems

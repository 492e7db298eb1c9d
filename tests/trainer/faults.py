"""Faults for tests: a bit flipped in one rank's memory at a point of a step, and runs that meet them."""

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from bagualu.comm.group import Communicator
from bagualu.fault_tolerance.checkpoint.layout.directory import list_checkpoints
from bagualu.fault_tolerance.straggler import Stragglers
from bagualu.trainer.assemble import TrainerState, assemble
from bagualu.trainer.data.corpus import prepare
from bagualu.trainer.engine.protocol import Engine
from bagualu.trainer.loop import Loop
from bagualu.trainer.process.failure import GuardError
from bagualu.trainer.recipe.config import Recipe
from bagualu.trainer.recovery.resume import resume
from bagualu.trainer.recovery.saving import Checkpoints, take_checkpoints
from bagualu.trainer.recovery.state import checkpoints_of
from tests.parity import working_tensors

Bits = dict[str, np.ndarray]


@dataclass(frozen=True)
class Fault:
    """At `point` of `step` (from 1) rank `rank` finds `how` in `where`; only the first time, unless `always`."""

    where: str
    """gradient: its own, the first that is reduced after `point`, before the guard sees it and other ranks' are added; reduced: its
    shard of the reduced one; copy: its working copy of a shard that another rank owns (under ZeRO-3 of its own shard, the only
    one); weight | exp_avg | exp_avg_sq | momentum_buffer: its first shard of the optimizer state that has it; buffer: its first
    buffer."""
    how: str = "bit"
    """bit: one mantissa bit, the value stays finite and of its size; huge: times 1e6; nan; inf; or a number to put there."""
    rank: int = 1
    step: int = 5
    point: str = "forward"
    always: bool = False
    steps: int = 1
    """In this many steps on."""


def gradient(how: str = "bit", **changes: Any) -> Fault:
    return Fault("gradient", how, point="data", **changes)


def reduced(how: str = "bit", **changes: Any) -> Fault:
    return Fault("reduced", how, point="agree", **changes)


@dataclass
class Injection:
    """Watches a rank's monitor and does what the fault says."""

    state: TrainerState
    fault: Fault
    done: int = 0

    def at(self, point: str, step: int) -> None:
        fault = self.fault
        here = point == fault.point and self.state.mesh.at("world") == fault.rank
        if not here or not fault.step <= step < fault.step + fault.steps:
            return
        if fault.always or not self.done:
            self.done += 1
            if fault.where == "gradient":
                spoil_reduction(self.state.engine, fault.how, self.done)
            else:
                spoil(self._tensor(), fault.how, self.done)

    def waits(self, what: str | None) -> None:
        return None

    def _tensor(self) -> torch.Tensor:
        engine, where = self.state.engine, self.fault.where
        if where == "reduced":
            return next(engine.reduced_gradients())
        if where == "copy":
            shard = next(shard for shard in engine.shards() if shard.group.size > 1)
            return shard.copies[(shard.group.rank + 1) % len(shard.copies)]
        if where == "buffer":
            return engine.untrained[0].tensor
        return next(shard[where] for shard in engine.optimizer.shards() if where in shard)


def spoil_reduction(engine: Engine, how: str, time: int) -> None:
    """Spoils the gradients that are reduced next, before the guard sees them."""
    guard = engine.before_reduction

    def spoiled(gradients: torch.Tensor) -> None:
        engine.before_reduction = guard
        spoil(gradients, how, time)
        if guard is not None:
            guard(gradients)

    engine.before_reduction = spoiled


def spoil(tensor: torch.Tensor, how: str, time: int) -> None:
    """One element, the largest, so that it matters. "random": another value every time; "scramble": all elements."""
    tensor = tensor.detach().view(-1)
    place = tensor.abs().argmax()
    if how == "bit":
        kind, bit = {8: (torch.int64, 50), 4: (torch.int32, 21), 2: (torch.int16, 5)}[tensor.element_size()]
        tensor.view(kind)[place] ^= 1 << bit
    elif how == "scramble":
        tensor.mul_(-3.0)
    elif how == "random":
        tensor[place] = time
    else:
        tensor[place] = 1e6 * (1 + tensor[place].abs()) if how == "huge" else float(how)


@dataclass
class Records:
    """A sink that keeps the lines without what depends on the clock."""

    lines: list[dict[str, Any]] = field(default_factory=list)

    def write(self, record: Any) -> None:
        timings = ("step_seconds", "data_seconds", "tokens_per_second", "mfu", "checkpoint_seconds", "new_shapes")
        self.lines.append({key: value for key, value in record.items() if key not in timings})

    def rewind(self, step: int) -> None:
        self.lines = [line for line in self.lines if line["step"] <= step]

    def close(self) -> None:
        return None


@dataclass(frozen=True)
class Ending:
    """How a run ended on one rank."""

    bits: Bits
    """Everything that the next step would depend on."""
    lines: list[dict[str, Any]]
    error: str
    guard: dict[str, Any]
    saved: list[str]
    damaged: list[dict[str, Any]]
    """Checkpoints that were set aside on the way back."""
    left_out_steps: int | None = None

    def line(self, step: int) -> dict[str, Any]:
        (found,) = [line for line in self.lines if line["step"] == step]
        return found


def bits_of(state: TrainerState) -> Bits:
    bits = {name: tensor.detach().clone().view(torch.uint8).cpu().numpy() for name, tensor in working_tensors(state)}
    for index, shard in enumerate(state.engine.optimizer.shards()):
        bits |= {f"{index}/{kind}": tensor.detach().clone().cpu().numpy() for kind, tensor in shard.items()}
    for index, held in enumerate(state.engine.shards()):
        bits |= {f"{index}/copy {at}": copy.detach().clone().view(torch.uint8).cpu().numpy() for at, copy in enumerate(held.copies)}
    memory = state.guard.memory
    figures = [state.updates, state.scaler.scale, state.scaler.good_steps, *memory.losses.values, *memory.norms.values]
    return bits | {"figures": np.array(figures)}


def train(
    communicator: Communicator, recipe: Recipe, fault: Fault | None = None, batches: Any = None, stop_at: int | None = None
) -> Ending:
    """A run from its first step, or its last checkpoint. `batches(state.batches)` may take the place of the data. In step `stop_at`
    (from 1) the run is asked to stop."""
    state = assemble(recipe, communicator, prepare(recipe.data, recipe.model.vocab))
    if batches is not None:
        state.batches = batches(state.batches)
    if fault is not None:
        state.mesh.monitor.observers.append(Injection(state, fault))
    checkpoints, records, error = Checkpoints(state, take_checkpoints(state)), Records(), ""
    ending: dict[str, Any] = {"damaged": []}
    stragglers = Stragglers(recipe.straggler, communicator.world, [state.mesh.group(axis) for axis in ("tensor", "replica")])
    try:
        loop = Loop(state, [records], lambda: state.mesh.monitor.step == stop_at, 1e-9, checkpoints, stragglers)
        ending = loop.run(resume(state).step)
    except GuardError as caught:
        error = str(caught)
    checkpoints.close()
    saved = [path.name for path in list_checkpoints(checkpoints_of(state))]
    return Ending(bits_of(state), records.lines, error, state.guard.memory.summary(), saved, ending["damaged"],
                  ending.get("left_out_steps"))  # fmt: skip


def left_out_steps(endings: list[Ending]) -> int:
    """Returns how many steps were left out, and asserts that all ranks agree on it."""
    (count,) = {ending.left_out_steps for ending in endings}
    assert count is not None
    return count


def assert_same_bits(found: list[Ending], expected: list[Ending]) -> None:
    """On every rank."""
    for rank, (one, other) in enumerate(zip(found, expected, strict=True)):
        assert one.bits.keys() == other.bits.keys()
        different = [name for name in other.bits if one.bits[name].tobytes() != other.bits[name].tobytes()]
        assert not different, f"rank {rank}: {different}"

"""Moves layers between the ranks of the pipeline during a run, if that makes its steps shorter.

At the end of a window of steps every rank reports how long its passes took. Rank 0 decides
(parallel/balance/stages/rebalance_policy.py) and broadcasts the decision. A move is a transaction: every rank allocates its new
stages and their state, boxes of master weights and moments are sent from memory to memory, all ranks agree that they have arrived,
and only then is the old state released. A failure before that changes nothing. During a move a rank holds both states, the new
optimizer state in host memory.
"""

import gc
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from statistics import median

from bagualu.comm.agree import gather, on_all
from bagualu.comm.monitor import Phase
from bagualu.comm.objects import broadcast_json, gather_json
from bagualu.parallel.balance.stages.forecast import Split
from bagualu.parallel.balance.stages.keys import memory_caps
from bagualu.parallel.balance.stages.rebalance_policy import Proposal, Watch
from bagualu.parallel.move_state import Relocation, table
from bagualu.parallel.pipeline.layer_slice import IN_ORDER
from bagualu.trainer.assemble import TrainerState
from bagualu.trainer.costs.analytic import analytic_table
from bagualu.trainer.costs.predicted_split import keeps_to_caps, with_prediction
from bagualu.trainer.costs.state import saved_bytes
from bagualu.trainer.costs.work import work_of
from bagualu.trainer.engine.build import hold
from bagualu.trainer.engine.local_model import no_values
from bagualu.trainer.engine.protocol import Engine, IncomingState

_BYTES_PER_SECOND = 5e8
"""The assumed speed of the first move, before any has been measured. It is low, so that the first move must be clearly
worthwhile."""


class MoveError(RuntimeError):
    """Layers could not be moved and stay where they are."""


@dataclass(frozen=True)
class Move:
    """A move of layers between ranks of the pipeline, successful or not."""

    before: list[int | float]
    """The number of layers of each stage before the move."""
    after: list[int | float]
    """The number of layers of each stage after the move, or as intended if the move failed."""
    speeds: list[float]
    """The speed of each pipeline rank, relative to the device of the cost table."""
    now_seconds: float
    """Predicted seconds of a step's passes with the layers `before`."""
    then_seconds: float
    """Predicted seconds of a step's passes with the layers `after`."""
    seconds: float
    """Seconds that the move took."""
    failed: str | None = None
    """Why the move failed and the layers stayed; None if it succeeded."""

    def __str__(self) -> str:
        ranks = ", ".join(f"{speed:.2f}" for speed in self.speeds)
        why = (f"ranks of the pipeline run at {ranks} of their speed; "
               f"passes of a step: {self.now_seconds:.3g} s, then {self.then_seconds:.3g} s")  # fmt: skip
        if self.failed:
            return f"layers stay {self.before}, not {self.after}: {self.failed}"
        return f"layers move from {self.before} to {self.after} in {self.seconds:.2g} s: {why}"


def open_rebalancer(state: TrainerState) -> "Rebalancer | None":
    """Returns the rebalancer of this rank; None if layers never move in this run."""
    parallel = state.recipe.parallel
    if not parallel.rebalance_every:
        return None
    watch = None
    if state.mesh.at("world") == 0:
        table = state.costs or analytic_table(work_of(state.recipe, state.mesh.layout))
        caps = memory_caps(parallel.memory_bytes, parallel.pipeline)
        watch = Watch(
            table, state.heaviest, state.split, parallel.rebalance.threshold, parallel.rebalance.windows, caps,
            state.recipe.activations(),
        )  # fmt: skip
    return Rebalancer(state, watch, parallel.rebalance_every)


@dataclass
class Rebalancer:
    """Moves layers when rank 0 decides so. `watch` makes the decisions on rank 0 and is None on other ranks. Decisions are made
    after every `every` computed steps, a window."""

    state: TrainerState
    watch: Watch | None
    every: int
    moves: list[Move] = field(default_factory=list)
    _busy: list[float] = field(default_factory=list)
    _bytes_per_second: float = _BYTES_PER_SECOND

    def after_step(self, step: int) -> Move | None:
        """Records how long the passes of the step just computed took; with it, `step` steps are done. At the end of a window
        (collective), moves layers if rank 0 so decides. Returns the move, even if it failed, the same on every rank but for its
        seconds; None without a move."""
        seconds = sum(timed.end - timed.start for timed in self.state.runner.stopwatch.passes())
        self._busy.append(seconds / self.state.schedule.micro_batches)
        if len(self._busy) < self.every:
            return None
        busy, self._busy = median(self._busy), []
        proposal = self._decide(self._by_pipeline_rank(busy), self.state.recipe.train.steps - step)
        return self._move(proposal, step) if proposal else None

    def go_back(self) -> None:
        """Discards the measurements of the present window, because the run has gone back to a checkpoint."""
        self._busy = []

    def _by_pipeline_rank(self, busy: float) -> list[float]:
        """Returns, by pipeline coordinate, the seconds for which the slowest rank was busy with a micro-batch. Collective."""
        layout, group = self.state.mesh.layout, self.state.mesh.group("world")
        seconds = gather(busy, group)  # the pipeline axis varies slowest, so ranks with the same coordinate are contiguous
        each = group.size // layout.pipeline
        return [max(seconds[coordinate * each : (coordinate + 1) * each]) for coordinate in range(layout.pipeline)]

    def _decide(self, busy: list[float], steps_left: int) -> Proposal | None:
        """Returns rank 0's proposal on every rank; None if layers should stay. Collective."""
        proposal = self.watch.after_window(busy, steps_left, self._move_seconds) if self.watch else None
        if proposal:
            recipe, layout = self.state.recipe, self.state.mesh.layout
            proposal = replace(proposal, split=with_prediction(recipe, layout, proposal.split, self.state.heaviest))
            proposal = proposal if keeps_to_caps(recipe, proposal.split) else None
        message = [proposal.split.to_json(), proposal.speeds, proposal.now_seconds, proposal.then_seconds] if proposal else None
        message = broadcast_json(message, self.state.mesh.group("world"))
        return Proposal(Split.from_json(message[0]), *message[1:]) if message else None

    def _move_seconds(self, split: Split) -> float:
        """Estimates the seconds that a move to `split` takes, at the speed of the last successful move (at first an assumed
        speed)."""
        return self._bytes_to_move(split) / self._bytes_per_second

    def _bytes_to_move(self, split: Split) -> int:
        """Returns the bytes of master weights, moments and buffers of the layers that would change ranks."""
        placement, work = self.state.mesh.placement, work_of(self.state.recipe, self.state.mesh.layout)
        before, after = (_rank_of_halves(either, placement.rank_of) for either in (self.state.split, split))
        halves = ((layer, part) for layer in range(self.state.recipe.model.layers) for part in IN_ORDER)
        return sum(saved_bytes(work, *half) for half, old, new in zip(halves, before, after, strict=True) if old != new)

    def _move(self, proposal: Proposal, step: int) -> Move:
        before, started = self.state.split.counts, time.perf_counter()
        failed, bytes_to_move = None, self._bytes_to_move(proposal.split)
        try:
            move(self.state, proposal.split, step)
        except MoveError as error:
            failed = str(error)
        seconds = time.perf_counter() - started
        if failed is None:
            self._bytes_per_second = bytes_to_move / seconds
        if self.watch and failed:
            self.watch.failed()
        elif self.watch:
            self.watch.moved(proposal.split)
        after = proposal.split.counts
        self.moves.append(Move(before, after, proposal.speeds, proposal.now_seconds, proposal.then_seconds, seconds, failed))
        return self.moves[-1]


def move(state: TrainerState, split: Split, step: int) -> None:
    """Moves the layers so that the ranks hold `split`, after `step` steps. Collective.

    The old state does not change until all ranks have the state of their new stages in memory. Raises MoveError on every rank if a
    rank has no room for the new state or cannot use it; then nothing has changed. An error while boxes are sent, or after all ranks
    have agreed, is not a MoveError: it ends the rank like an error in any other communication.
    """
    world, monitor = state.mesh.group("world"), state.mesh.monitor
    made: list[Engine] = []

    def make_room() -> IncomingState:
        monitor.at(Phase.MOVE)
        made.append(hold(state.recipe, state.mesh, split, no_values))
        return made[0].incoming()

    before = state.engine
    try:
        incoming = on_all(make_room, world, MoveError)
        held, wanted = list(before.pieces()), list(incoming.pieces())
        tables = gather_json(table(held, wanted), world)
        relocation = on_all(lambda: Relocation(held, wanted, tables, world), world, MoveError)
        relocation.run()
        on_all(lambda: monitor.at(Phase.MOVED), world, MoveError)
    except MoveError:
        for engine in made:
            engine.close()
        raise
    made[0].open()
    incoming.apply(state.updates)
    state.take(split, made[0], step)
    before.close()
    del before
    gc.collect()  # DeepSpeed's engine refers to itself, and would keep its memory until Python looks for such objects


def _rank_of_halves(split: Split, rank_of: Callable[[int], int]) -> list[int]:
    """Returns, for each half of each layer of the model, the pipeline rank that holds it."""
    return [rank_of(stage) for stage, one in enumerate(split.slices) for _ in range(one.start, one.stop)]

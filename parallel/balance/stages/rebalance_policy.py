"""Decides from measured times whether layers should move to other ranks during a run.

A rank's current speed is the time that its layers take according to the cost table, divided by the time that it was busy with a
micro-batch. The best split for these speeds is chosen as at the start. A window is a number of steps over which times are measured.
Layers move when the new split would shorten a step by a sufficient fraction, in each of several windows in a row, and the remaining
steps gain more than the move costs.

To prevent oscillation, every move, even one that fails, doubles the number of windows in a row that the next move needs. A doubling
is undone after many windows without anything to gain, so slowness that comes and goes moves layers only if it lasts long.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median

from bagualu.parallel.balance.stages.activations import ALL_KEPT, Activations
from bagualu.parallel.balance.stages.choose import choose_split
from bagualu.parallel.balance.stages.cost import CostTable
from bagualu.parallel.balance.stages.forecast import Split, by_rank, step_seconds
from bagualu.parallel.balance.stages.problem import Problem, StageTimes
from bagualu.parallel.pipeline.layer_slice import cut_inside
from bagualu.parallel.pipeline.schedules.schedule import Schedule

_FORGETS_AFTER = 8
"""A doubling is undone after `Watch.patience` times this number of windows in a row without a sufficient gain."""
_NEARLY = 0.02


@dataclass(frozen=True)
class Proposal:
    """A split to which layers should move."""

    split: Split
    speeds: list[float]
    """The speed of each pipeline rank, relative to the device of the cost table."""
    now_seconds: float
    """Predicted seconds of all passes of a step with the present split, at these speeds."""
    then_seconds: float
    """Predicted seconds of all passes of a step with the proposed split, at these speeds."""


class Watch:
    """Decides after every window of measured times whether layers should move. It runs on one rank."""

    def __init__(
        self,
        table: CostTable,
        schedule: Schedule,
        split: Split,
        threshold: float,
        windows: int,
        caps: Sequence[int] | None = None,
        activations: Activations = ALL_KEPT,
    ) -> None:
        """A move must shorten a step by at least the fraction `threshold` in each of `windows` windows in a row. `split` is the
        present split; `caps` and `activations` are as in `choose_split`."""
        self._table, self._schedule, self._caps, self._activations = table, schedule, caps, activations
        self._split = split
        self._threshold, self._windows = threshold, windows
        self._seen: list[list[float]] = []
        """For each of the latest windows in a row in which a move would have gained enough: the ranks' speeds."""
        self._caution = 0
        """How often `patience` is doubled at present: once for every move or failed move, less the doublings that were undone."""
        self._quiet = 0
        """The number of latest windows in a row in which no move would have gained enough."""
        self._chosen: tuple[list[float], Split] | None = None
        """The last speeds for which a split was chosen, and that split; None before the first choice."""

    @property
    def patience(self) -> int:
        """The number of windows in a row in which the next move must gain enough before it is made."""
        return self._windows << self._caution

    def after_window(
        self, busy_seconds: Sequence[float], steps_left: int, move_seconds: Callable[[Split], float]
    ) -> Proposal | None:
        """Returns the move to make after a window; None if layers should stay.

        `busy_seconds` is the time per micro-batch that each pipeline rank computed in this window. `steps_left` is the number of
        steps that the run still has. `move_seconds` returns the seconds that a move to a split takes.
        """
        self._seen.append(self._speeds(busy_seconds))
        if self._best(self._seen[-1]) is None:
            self._calm()
            return None
        self._quiet = 0
        if len(self._seen) < self.patience:
            return None
        del self._seen[: -self.patience]
        best = self._best([median(column) for column in zip(*self._seen, strict=True)])
        if best is None or not all(self._gains(best.split, speeds) for speeds in self._seen):
            return None
        gained = (best.now_seconds - best.then_seconds) * steps_left
        return best if gained > move_seconds(best.split) else None

    def moved(self, split: Split) -> None:
        """Records that the layers have moved to `split`."""
        self._split, self._seen, self._quiet = split, [], 0
        self._caution += 1

    def failed(self) -> None:
        """Records that a move failed: the present split stays, and the next move needs twice as many windows, as after a move."""
        self._seen, self._quiet = [], 0
        self._caution += 1

    def _calm(self) -> None:
        self._seen = []
        self._quiet += 1
        if self._caution and self._quiet >= _FORGETS_AFTER * self.patience:
            self._caution, self._quiet = self._caution - 1, 0

    def _speeds(self, busy_seconds: Sequence[float]) -> list[float]:
        even = self._problem([1.0] * len(busy_seconds), self._split)
        times = self._times(self._split, even)
        expected = [sum(times[stage].total for stage in stages) for stages in even.stages_of]
        return [seconds / busy for seconds, busy in zip(expected, busy_seconds, strict=True)]

    def _best(self, speeds: list[float]) -> Proposal | None:
        """Returns a proposal of the best split for these speeds; None if it does not shorten a step by the threshold."""
        problem = self._problem(speeds, self._split)
        costs = [problem.cost(rank, mine) for rank, mine in enumerate(by_rank(problem, problem.pieces(self._split.slices)))]
        seconds = [cost.seconds for cost in costs if cost is not None]
        if len(seconds) == len(costs) and max(seconds) * (1 - self._threshold) * len(seconds) < sum(seconds):
            return None  # even perfectly equal ranks would not gain enough
        split = self._choice(speeds)
        now, then = self._step_seconds(self._split, speeds), self._step_seconds(split, speeds)
        return Proposal(split, speeds, now, then) if then <= now * (1 - self._threshold) else None

    def _choice(self, speeds: list[float]) -> Split:
        """Returns the best split for `speeds`. If they are nearly those of the last choice, returns its split, because choosing
        takes long."""
        last = self._chosen
        if last is None or any(abs(new / old - 1) > _NEARLY for new, old in zip(speeds, last[0], strict=True)):
            last = speeds, choose_split(self._table, self._schedule, speeds, self._caps, self._activations)
            self._chosen = last
        return last[1]

    def _gains(self, split: Split, speeds: list[float]) -> bool:
        """Returns whether, at these speeds, `split` shortens a step of the present split by the threshold."""
        return self._step_seconds(split, speeds) <= self._step_seconds(self._split, speeds) * (1 - self._threshold)

    def _step_seconds(self, split: Split, speeds: list[float]) -> float:
        problem = self._problem(speeds, split)
        return step_seconds(problem, self._times(split, problem))

    def _times(self, split: Split, problem: Problem) -> list[StageTimes]:
        chosen = problem.recomputing(split.recompute)
        return [problem.stage_times(stage, piece, chosen) for stage, piece in enumerate(problem.pieces(split.slices))]

    def _problem(self, speeds: list[float], split: Split) -> Problem:
        """Returns the problem whose pieces can be those of `split`."""
        return Problem(self._table, self._schedule, speeds, self._caps, self._activations, cut_inside(split.slices))

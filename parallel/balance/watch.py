"""Whether layers should move to other ranks while a run goes on: a pure function of what was measured. Free of torch.

What a rank was busy for with a micro-batch, against what the cost table says its layers take, is its speed now. With these speeds
the best split is chosen anew, as at the start. Layers move when that makes a step shorter by a share that matters, in each of
several windows in a row, and the steps that are left gain more than the move costs.

Against swinging to and fro: after every move it takes twice as many windows in a row until the next. That is forgotten again after
many windows with nothing to gain, so slowness that comes and goes moves layers only if it stays for long.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median

from bagualu.parallel.balance.choose import choose_split
from bagualu.parallel.balance.cost import CostTable
from bagualu.parallel.balance.forecast import Split, by_rank, step_seconds
from bagualu.parallel.balance.problem import Problem
from bagualu.parallel.pipeline.schedule import Schedule

_FORGETS_AFTER = 8
"""Times the patience."""
_NEARLY = 0.02


@dataclass(frozen=True)
class Proposal:
    """A split that is worth moving to."""

    split: Split
    speeds: list[float]
    """By rank of the pipeline, 1.0 the device of the cost table."""
    now_seconds: float
    """Of the passes of a step, as things are."""
    then_seconds: float


class Watch:
    """Sees every window of a run, on the one rank that decides."""

    def __init__(
        self,
        table: CostTable,
        schedule: Schedule,
        split: Split,
        threshold: float,
        windows: int,
        caps: Sequence[int] | None = None,
        recompute: str = "none",
    ) -> None:
        """`threshold`: the share of a step that has to be gained; `windows`: in so many of them in a row."""
        self._table, self._schedule, self._caps, self._recompute = table, schedule, caps, recompute
        self._split = split
        self._threshold, self._windows = threshold, windows
        self._seen: list[list[float]] = []
        """Speeds in the windows, up to now, in which a move would have been worth it."""
        self._caution = 0
        """Moves not yet forgotten."""
        self._quiet = 0
        """Windows in a row with nothing to gain."""
        self._chosen: tuple[list[float], Split] | None = None
        """The last speeds that a split was chosen for, and that split."""

    @property
    def patience(self) -> int:
        """Windows in a row that it takes."""
        return self._windows << self._caution

    def after_window(
        self, busy_seconds: Sequence[float], steps_left: int, move_seconds: Callable[[Split], float]
    ) -> Proposal | None:
        """`busy_seconds`: what each rank of the pipeline was busy for with one micro-batch; `move_seconds`: what a move costs."""
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
        """The layers lie so now."""
        self._split, self._seen, self._quiet = split, [], 0
        self._caution += 1

    def failed(self) -> None:
        """The layers were to move and could not: it takes as long until the next try as after a move."""
        self._seen, self._quiet = [], 0
        self._caution += 1

    def _calm(self) -> None:
        self._seen = []
        self._quiet += 1
        if self._caution and self._quiet >= _FORGETS_AFTER * self.patience:
            self._caution, self._quiet = self._caution - 1, 0

    def _speeds(self, busy_seconds: Sequence[float]) -> list[float]:
        even = self._problem([1.0] * len(busy_seconds))
        pieces = [(piece.start, piece.stop) for piece in self._split.slices]
        again = self._split.recompute
        expected = [
            sum(even.stage_times(stage, pieces[stage], again[stage]).total for stage in stages) for stages in even.stages_of
        ]
        return [one / busy for one, busy in zip(expected, busy_seconds, strict=True)]

    def _best(self, speeds: list[float]) -> Proposal | None:
        """The best split for these speeds, where it is enough of a gain over the one there is."""
        problem = self._problem(speeds)
        pieces = [(piece.start, piece.stop) for piece in self._split.slices]
        costs = [problem.cost(rank, mine) for rank, mine in enumerate(by_rank(problem, pieces))]
        seconds = [cost.seconds for cost in costs if cost is not None]
        if len(seconds) == len(costs) and max(seconds) * (1 - self._threshold) * len(seconds) < sum(seconds):
            return None  # not even ranks that are all alike would gain enough
        split = self._choice(speeds)
        now, then = self._step_seconds(self._split, problem), self._step_seconds(split, problem)
        return Proposal(split, speeds, now, then) if then <= now * (1 - self._threshold) else None

    def _choice(self, speeds: list[float]) -> Split:
        """The best split; for nearly the same speeds as last time that of last time, as choosing takes long."""
        last = self._chosen
        if last is None or any(abs(one / other - 1) > _NEARLY for one, other in zip(speeds, last[0], strict=True)):
            last = speeds, choose_split(self._table, self._schedule, speeds, self._caps, self._recompute)
            self._chosen = last
        return last[1]

    def _gains(self, split: Split, speeds: list[float]) -> bool:
        """Whether `split` would have been enough of a gain at these speeds."""
        problem = self._problem(speeds)
        return self._step_seconds(split, problem) <= self._step_seconds(self._split, problem) * (1 - self._threshold)

    def _step_seconds(self, split: Split, problem: Problem) -> float:
        times = [
            problem.stage_times(stage, (piece.start, piece.stop), again)
            for stage, (piece, again) in enumerate(zip(split.slices, split.recompute, strict=True))
        ]
        return step_seconds(problem, times)

    def _problem(self, speeds: list[float]) -> Problem:
        return Problem(self._table, self._schedule, speeds, self._caps, self._recompute)

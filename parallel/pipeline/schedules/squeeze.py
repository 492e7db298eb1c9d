"""Shortens a schedule by moving passes into steps in which their rank would wait."""

from collections.abc import Iterator

from bagualu.parallel.layout import StagePlacement
from bagualu.parallel.pipeline.schedules.schedule import Action, Kind, dependencies


def squeeze(schedule: list[list[Action]], placement: StagePlacement) -> list[list[Action]]:
    """Returns the same passes with less waiting (the squeezing and reordering of arXiv 2405.15362, in a single sweep).

    Every pass is taken to last one time step. In each time step, every rank does the first pass of its list whose inputs are
    available. It never holds more activations than its own list would at its peak, and passes of the same kind at the same stage
    keep their order. Raises ValueError if passes wait for each other.
    """
    ranks = [_Rank(list(actions)) for actions in schedule]
    done: set[Action] = set()
    while any(rank.left for rank in ranks):
        step = [action for rank in ranks if (action := rank.take(done, placement)) is not None]
        if not step:
            raise ValueError("the passes of this schedule wait for each other")
        done.update(step)
    return [rank.done for rank in ranks]


class _Rank:
    def __init__(self, actions: list[Action]) -> None:
        self.left = actions
        self.done: list[Action] = []
        self._held = 0
        self._most = max(_held_after_each(actions, 0))

    def take(self, done: set[Action], placement: StagePlacement) -> Action | None:
        """Removes and returns the first pass of the list that can run now without exceeding the rank's peak of activations; None if
        no pass can."""
        seen: set[tuple[Kind, int]] = set()
        kinds = 3 * placement.chunks
        peak = self._held
        for index, (action, held) in enumerate(zip(self.left, _held_after_each(self.left, self._held), strict=False)):
            fits = action.kind != Kind.FORWARD or peak < self._most
            if (action.kind, action.stage) not in seen and fits and done.issuperset(dependencies(action, placement)):
                return self._do(index)
            seen.add((action.kind, action.stage))
            if len(seen) == kinds:
                return None
            peak = max(peak, held)
        return None

    def _do(self, index: int) -> Action:
        action = self.left.pop(index)
        self.done.append(action)
        self._held += _change(action)
        return action


def _change(action: Action) -> int:
    return (action.kind == Kind.FORWARD) - (action.kind == Kind.WEIGHT_GRADIENT)


def _held_after_each(actions: list[Action], held: int) -> Iterator[int]:
    """Yields, after each of `actions`, the number of forward passes whose activations are held; `held` is that number before
    them."""
    for action in actions:
        held += _change(action)
        yield held

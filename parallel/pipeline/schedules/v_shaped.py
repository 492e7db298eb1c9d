"""A notation for V-shaped schedules with two chunks per rank."""

from collections import Counter, deque

from bagualu.parallel.layout import StagePlacement
from bagualu.parallel.pipeline.schedules.schedule import Action, Kind


class Speller:
    """Builds the list of a rank's passes from a short notation. `do("F1 I0")` appends the next forward pass of the second chunk,
    then the next I of the first.

    The digit is the chunk; B is a whole backward pass. W appends the oldest W of any chunk whose I is done, W0 and W1 the oldest of
    that chunk; if there is none, they append nothing.
    """

    def __init__(self, placement: StagePlacement, rank: int) -> None:
        self._stages = placement.stages_of(rank)
        self._next: Counter[tuple[bool, int]] = Counter()
        self._waiting: deque[Action] = deque()
        self.actions: list[Action] = []

    def do(self, passes: str, times: int = 1) -> None:
        """Appends `passes`, e.g. "F1 I0 W", `times` times."""
        for symbol in passes.split() * times:
            if symbol[0] == Kind.WEIGHT_GRADIENT:
                self._weight_gradient(None if symbol == "W" else self._stages[int(symbol[1])])
                continue
            kind, stage = Kind(symbol[0]), self._stages[int(symbol[1])]
            action = Action(kind, self._next[kind == Kind.FORWARD, stage], stage)
            self._next[kind == Kind.FORWARD, stage] += 1
            self.actions.append(action)
            if kind == Kind.INPUT_GRADIENT:
                self._waiting.append(Action(Kind.WEIGHT_GRADIENT, action.micro_batch, stage))

    def _weight_gradient(self, stage: int | None) -> None:
        action = next((waiting for waiting in self._waiting if stage in (None, waiting.stage)), None)
        if action is not None:
            self._waiting.remove(action)
            self.actions.append(action)

    def rest(self) -> None:
        """Appends every W whose I is done, the oldest first."""
        self.actions += self._waiting
        self._waiting.clear()


def only(actions: list[Action], micro_batches: int) -> list[Action]:
    """Returns the actions of the first `micro_batches` micro-batches. The order does not change, so the schedule stays valid."""
    return [action for action in actions if action.micro_batch < micro_batches]

"""What schedules with two chunks a rank, there and back again, are spelt with. Free of torch."""

from collections import Counter, deque

from bagualu.parallel.pipeline.schedule import Action, Kind, Placement


class Speller:
    """Writes down the passes of one rank: `do("F1 I0")` appends the next forward pass of its second chunk and then the next I of
    its first one. W alone is the oldest W that waits, or nothing where none does; W0 and W1 the oldest of that chunk."""

    def __init__(self, placement: Placement, rank: int) -> None:
        self._stages = placement.stages_of(rank)
        self._next: Counter[tuple[bool, int]] = Counter()
        self._waiting: deque[Action] = deque()
        self.actions: list[Action] = []

    def do(self, words: str, times: int = 1) -> None:
        for word in words.split() * times:
            if word[0] == Kind.WEIGHT_GRADIENT:
                self._weight_gradient(None if word == "W" else self._stages[int(word[1])])
                continue
            kind, stage = Kind(word[0]), self._stages[int(word[1])]
            action = Action(kind, self._next[kind == Kind.FORWARD, stage], stage)
            self._next[kind == Kind.FORWARD, stage] += 1
            self.actions.append(action)
            if kind == Kind.INPUT_GRADIENT:
                self._waiting.append(Action(Kind.WEIGHT_GRADIENT, action.micro_batch, stage))

    def _weight_gradient(self, stage: int | None) -> None:
        action = next((one for one in self._waiting if stage in (None, one.stage)), None)
        if action is not None:
            self._waiting.remove(action)
            self.actions.append(action)

    def rest(self) -> None:
        """Every W that still waits, the oldest first."""
        self.actions += self._waiting
        self._waiting.clear()


def only(actions: list[Action], micro_batches: int) -> list[Action]:
    """The schedule of fewer micro-batches: without the others. What is left keeps its order, on every rank, so it stays right."""
    return [action for action in actions if action.micro_batch < micro_batches]

"""Composes a step of many micro-batches from the trace of few.

With many micro-batches, passes repeat. What an action does depends on its kind and stage; the first pass of a kind overwrites
gradients, and the last starts their reduction. Under ZeRO-2 and 3 it also depends on the passes around it, whose reductions may
still be in progress and which gather weights for the pass that follows. Together this is the action's case. A shorter program that
has every case is traced, and the step is composed of its sections along the real program.
"""

from collections import Counter
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

from bagualu.comm.calls import Communication, Pending, Waited
from bagualu.parallel.layout import StagePlacement
from bagualu.parallel.pipeline.program import Program
from bagualu.parallel.pipeline.schedules.schedule import PASSES, SENDS, Action, Kind
from bagualu.parallel.simulation.events import Event, RankTrace, Section

_TOWARDS = {Kind.RECEIVE_ACTIVATION: -1, Kind.SEND_ACTIVATION: 1, Kind.RECEIVE_GRADIENT: 1, Kind.SEND_GRADIENT: -1}
"""For each kind of message, whether the other rank holds the next stage (1) or the previous one (-1)."""
_RUNS_MODULES = (Kind.FORWARD, Kind.BACKWARD, Kind.INPUT_GRADIENT)
"""The passes that need weights. The others compute gradients of weights that were deferred."""
_COMPUTES_GRADIENTS = (Kind.BACKWARD, Kind.INPUT_GRADIENT, Kind.WEIGHT_GRADIENT)
_COMPLETES_GRADIENTS = (Kind.BACKWARD, Kind.WEIGHT_GRADIENT)
_IN_FLIGHT = 2
"""The number of reductions under ZeRO-2 and 3 that may be in progress at the same time."""


@dataclass(frozen=True)
class Carried:
    """What a pass leaves to later passes of its rank, besides activations and gradients."""

    gathered: bool = False
    """Weights that it has gathered for the pass that follows (ZeRO-3)."""
    kept: bool = False
    """Weights that stay until the end of the step once they are gathered (ZeRO-3)."""
    reductions: bool = False
    """Reductions of a micro-batch's gradients that have not ended (ZeRO-2 and 3)."""
    parts: bool = False
    """Buckets that hold gradients of one stage and wait for those of another stage of the rank (ZeRO-2)."""


class Case(NamedTuple):
    """What determines the events of an action."""

    key: Hashable
    """Equal for actions with equal events, also for those of different ranks whose stages are alike."""
    micro_batches: frozenset[int]
    """A program of these micro-batches, of those that are first or last in any way, and of any others has the same case."""


class _Label(NamedTuple):
    kind: Kind
    stage: int
    """The index of the stage among those of the rank."""
    first: bool
    """Whether the action is the first of its kind at its stage."""
    last: bool


def cases(actions: Sequence[Action], placement: StagePlacement, carried: Carried) -> list[Case]:
    """Returns the case of each action of a rank."""
    labels = _labels(actions)
    around = _around(actions) if carried.gathered else {}
    done: dict[int, frozenset[tuple[Kind, int]]] = {}  # by micro-batch, its passes so far: the last that has a tensor frees it
    gradients = _gradients(actions, labels, placement.stages - 1, carried)
    found = []
    for index, (action, label, (state, led)) in enumerate(zip(actions, labels, gradients, strict=True)):
        neighbours = [None if other is None else labels[other] for other in around.get(index, ())]
        passes = tuple(other and (other.kind, other.stage, carried.kept and other.first) for other in neighbours)
        needed = {action.micro_batch, *led, *(actions[other].micro_batch for other in around.get(index, ()) if other is not None)}
        earlier = done.setdefault(action.micro_batch, frozenset())
        if action.kind in PASSES:
            done[action.micro_batch] = earlier | {(label.kind, label.stage)}
        found.append(Case((label, passes, state, earlier), frozenset(needed)))
    return found


def shorten(actions: Sequence[Action], placement: StagePlacement, carried: Carried) -> list[Action]:
    """Returns a program of few micro-batches, numbered from 0, that has every case of the program `actions` of a rank."""
    choices: dict[Hashable, list[frozenset[int]]] = {}
    for case in cases(actions, placement, carried):
        choices.setdefault(case.key, []).append(case.micro_batches)
    kept: set[int] = set()
    for choice in sorted(choices.values(), key=len):
        kept |= min(choice, key=lambda micro_batches: len(micro_batches - kept))
    numbers = {micro_batch: number for number, micro_batch in enumerate(sorted(kept))}
    return [replace(action, micro_batch=numbers[action.micro_batch]) for action in actions if action.micro_batch in kept]


def compose(
    traced: RankTrace, short: Sequence[Action], wanted: Program, placement: StagePlacement, carried: Carried, rank: int
) -> RankTrace:
    """Returns the step of `rank`, whose program is `wanted`, from the sections of a rank whose stages are alike and whose program
    `short` has every case of `wanted`.

    Sections of actions that do the same share the list of their events. A block of memory of the result stands for those of several
    micro-batches. What is outside the program is as in `traced`, also kernels on a few numbers of which there is one for each
    micro-batch, such as the count of labels.
    """
    sections = {section.action: section for section in traced.sections if section.action is not None}
    sources = {case.key: sections.get(action) for action, case in zip(short, cases(short, placement, carried), strict=True)}
    before, after = _outside(traced.sections)
    composed, copies, sends = before, _Copies(), _Sends()
    for action, case in zip(wanted.actions, cases(wanted.actions, placement, carried), strict=True):
        if (source := sources[case.key]) is None:  # it has no events
            continue
        towards = _TOWARDS.get(action.kind)
        peer = None if towards is None else placement.rank_of(action.stage + towards)
        events = copies.events(source, peer)
        if action.kind in SENDS:
            sends.begin(action, events)
        waited = tuple(map(sends.wait, wanted.arrived.get(action, ())))
        composed.append(Section(source.phase, action, copies.events(source, peer, waited) if waited else events))
    if end := [sends.wait(action) for action in list(sends.calls)]:
        after[0] = replace(after[0], events=end + after[0].events)
    return RankTrace(rank, composed + [section for section in after if section.events], traced.kinds)


def _labels(actions: Sequence[Action]) -> list[_Label]:
    stages = {stage: index for index, stage in enumerate(sorted({action.stage for action in actions}))}
    totals, done = Counter((action.kind, action.stage) for action in actions), Counter[tuple[Kind, int]]()
    labels = []
    for action in actions:
        key = action.kind, action.stage
        done[key] += 1
        labels.append(_Label(action.kind, stages[action.stage], done[key] == 1, done[key] == totals[key]))
    return labels


def _around(actions: Sequence[Action]) -> dict[int, tuple[int | None, int | None]]:
    """Returns, for the index of each pass that runs modules, the indices of such passes before and after it, None at the ends."""
    passes = [index for index, action in enumerate(actions) if action.kind in _RUNS_MODULES]
    return dict(zip(passes, zip([None, *passes[:-1]], [*passes[1:], None], strict=True), strict=True))


def _gradients(
    actions: Sequence[Action], labels: Sequence[_Label], last_stage: int, carried: Carried
) -> Iterator[tuple[Hashable, set[int]]]:
    """Yields for each action what of earlier actions determines when it reduces gradients, and their micro-batches."""
    computes = [action.kind in _COMPUTES_GRADIENTS for action in actions]
    settles = [
        action.kind == Kind.FORWARD and action.stage == last_stage for action in actions
    ]  # the head waits for all reductions
    # What is computed before a bucket has all gradients of a micro-batch: some of the backward passes of a stage or of all stages.
    whole = [(action.micro_batch, 0 if carried.parts else action.stage) for action in actions]
    passes = Counter(key for key, one in zip(whole, computes, strict=True) if one)
    recent: list[int] = []  # the passes whose reductions may be in progress, or whose gradients a bucket may hold
    begun: dict[tuple[int, int], list[_Label]] = {}
    complete: set[_Label] = set()
    for index, label in enumerate(labels):
        if carried.reductions and (settles[index] or computes[index]):
            parts = Counter(part[:2] for done in begun.values() for part in done)
            led = {actions[earlier].micro_batch for earlier in recent} | {micro_batch for micro_batch, _ in begun}
            yield (tuple(labels[earlier][:2] for earlier in recent), frozenset(parts.items())), led
        else:  # buckets are reduced in their order, which may not be that in which they are complete
            yield frozenset(complete) if computes[index] and label.last else None, set()
        if settles[index] and not (recent and settles[recent[-1]]):
            recent = [*recent, index] if carried.parts else []
        if computes[index]:
            recent = _from_last_reductions([*recent, index], labels, carried)
            complete |= {label} if label.last else set()
            done = begun.setdefault(whole[index], [])
            done.append(label)
            if len(done) == passes[whole[index]]:
                del begun[whole[index]]


def _from_last_reductions(recent: list[int], labels: Sequence[_Label], carried: Carried) -> list[int]:
    """Returns the end of `recent` in which as many passes complete gradients as reductions may be in progress at the same time and,
    if buckets wait for several stages, passes of all of them."""
    missing, completed = {label.stage for label in labels} if carried.parts else set(), 0
    for count, index in enumerate(reversed(recent), 1):
        if labels[index].kind in _COMPLETES_GRADIENTS:
            missing.discard(labels[index].stage)
            completed += 1
        if not missing and completed >= _IN_FLIGHT:
            return recent[-count:]
    return recent


def _outside(sections: Sequence[Section]) -> tuple[list[Section], list[Section]]:
    """Returns the sections before the program, and those after it: in the first of them the rank waits for its sends, if it has
    any, which are left out."""
    inside = [index for index, section in enumerate(sections) if section.action is not None]
    first, *rest = sections[inside[-1] + 1 :]
    return list(sections[: inside[0]]), [replace(first, events=list(filter(_is_no_wait_for_send, first.events))), *rest]


def _is_no_wait_for_send(event: Event) -> bool:
    return not (isinstance(event, Waited) and event.kind == "send")


class _Copies:
    """The events of traced sections with other peers and with the waits of the real program; equal copies are one list."""

    def __init__(self) -> None:
        self._made: dict[tuple[int, int | None, tuple[Waited, ...]], list[Event]] = {}

    def events(self, section: Section, peer: int | None, waited: tuple[Waited, ...] = ()) -> list[Event]:
        """Returns the events of a section, whose messages go to or come from `peer`, followed by `waited`."""
        if peer is None and not waited:
            return section.events
        key = id(section), peer, waited
        if key not in self._made:
            self._made[key] = [*(_towards(event, peer) for event in section.events), *waited]
        return self._made[key]


def _towards(event: Event, peer: int | None) -> Event:
    if isinstance(event, Communication | Waited) and event.peer is not None:
        return replace(event, peer=peer)
    return event


class _Sends:
    """The sends of a program that have begun and for which the rank has not waited."""

    def __init__(self) -> None:
        self.calls: dict[Action, Communication] = {}
        self._pending = Pending[Action]()

    def begin(self, action: Action, events: Sequence[Event]) -> None:
        """Adds the sends among the events of an action."""
        for event in events:
            if isinstance(event, Communication) and event.kind == "send":
                self.calls[action] = event
                self._pending.begin(event, action)

    def wait(self, action: Action) -> Waited:
        """Returns the event that the rank has waited for the send of an action."""
        return self._pending.waited(self.calls.pop(action), action)

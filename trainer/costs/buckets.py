"""The gradient buckets of a rank, computed from shapes as parallel/data/bucket.py builds them, and what their reductions hold.

Under ZeRO-2 and 3, the gradients of a bucket exist from the first gradient that is added to them until they are reduced; a bucket
in reduction also receives the other ranks' parts. In a step with one micro-batch, the gradients of a bucket that is not partitioned
exist from the first one until the next step. Under ZeRO-3, the weights of a unit (embedding, a layer, the last norm, the head)
are gathered while it computes, and so are those of the unit that comes next.
"""

from collections import Counter, deque
from dataclasses import dataclass, field
from statistics import median_high

from bagualu.parallel.pipeline.layer_slice import LayerPart
from bagualu.trainer.costs.state import (
    EMBEDDING,
    EMBEDDING_NORM,
    Layers,
    StatePart,
    divided_state,
    ends_with,
    is_partial,
    part_of,
    placement_of,
    rank_parameters,
)
from bagualu.trainer.costs.work import ModelWork
from bagualu.trainer.optim.config import OptimConfig

_SHARD_MULTIPLE = 8
"""As in parallel/data/bucket.py."""
_MOST_IN_FLIGHT = 2
"""As in parallel/data/reducer.py."""
_SENT_WHOLE = 2**21
"""As `_MANY` in comm/gloo.py."""


@dataclass
class PlannedBucket:
    """Parameters that are reduced and updated together; frozen ones, which ZeRO-3 divides, share no bucket with others."""

    name: str
    """The global name of one of the parameters."""
    trained: bool
    ranks: int
    """The number of ranks that hold the same elements."""
    over_two_axes: bool
    """Whether the gradients are summed over a second axis too, and so kept whole."""
    units: list[int] = field(default_factory=list)
    """The unit of each gradient that a micro-batch adds, in the order of the backward pass."""
    elements: int = 0

    @property
    def padded(self) -> int:
        whole = self.ranks * _SHARD_MULTIPLE
        return -(-self.elements // whole) * whole

    @property
    def partitioned(self) -> bool:
        return self.ranks > 1


def plan_buckets(work: ModelWork, optim: OptimConfig, bucket_bytes: int, layers: Layers) -> list[PlannedBucket]:
    """Returns the buckets of a rank that holds these layers, and the embedding and the head as in `rank_parameters`."""
    plan = work.plan
    building: dict[object, PlannedBucket] = {}
    buckets: list[PlannedBucket] = []
    for name, shape, units in reversed(rank_parameters(work, layers)):
        part, placement = part_of(work, name, shape), placement_of(work, name)
        trained = part.name not in work.frozen
        if not trained and work.zero < 3:
            continue
        tied = part.name in plan.tied.values() and work.ends_apart
        copied = "tensor" not in placement.axes and work.layout.tensor > 1
        treatment = optim.treatment(part.name, len(shape)) if trained else None
        kind = placement.reduction_axis, is_partial(work, placement), tied, copied, trained, treatment
        key = kind, units[-1] if work.zero == 3 else None
        if key not in building:
            building[key] = PlannedBucket(part.name, trained, part.ranks, part.over_two_axes)
            buckets.append(building[key])
        bucket = building[key]
        bucket.units += reversed(units)
        bucket.elements += part.elements
        if bucket.elements * work.accurate_bytes >= bucket_bytes:
            del building[key]
    return buckets


def buckets_state(work: ModelWork, buckets: list[PlannedBucket]) -> Counter[str]:
    """Returns the bytes, by kind, that a rank holds of the parameters in buckets, padding included."""
    states = (divided_state(work, StatePart(bucket.name, bucket.padded, bucket.ranks, bucket.over_two_axes)) for bucket in buckets)
    return sum(states, Counter[str]())


@dataclass(frozen=True)
class Transfers:
    """The most bytes, by unit, that a rank holds for reductions and gathered weights while the unit computes."""

    forward: Counter[int]
    backward: Counter[int]
    of_attention: Counter[int] = field(default_factory=Counter)
    """Those of `backward` of a decoder layer that are not there yet while its feed-forward computes."""

    def plus(self, other: "Transfers") -> "Transfers":
        return Transfers(self.forward + other.forward, self.backward + other.backward, self.of_attention + other.of_attention)


def transfers(work: ModelWork, buckets: list[PlannedBucket], layers: Layers, passes: int, keep_bytes: int = 0) -> Transfers:
    """Returns what a rank that holds these layers holds for transfers during the last of `passes` backward passes of a step. Up to
    `keep_bytes` of gathered weights stay through the step."""
    last = work.model.layers
    ends = ends_with(work, layers)
    normed = [EMBEDDING_NORM] * (ends[0] and work.model.embedding_norm)
    units = [*[EMBEDDING] * ends[0], *normed, *layers, *[last, last + 1] * ends[1]]
    # Those whose weights the backward pass reads too.
    again = [i for i in [*normed, *layers] if work.passes_gradients(max(i, 0))] + [last] * ends[1]
    reducing = _Reducing(work, [one for one in buckets if one.trained and one.partitioned and not one.over_two_axes])
    head_trained = work.plan.global_name("head.weight") not in work.frozen
    in_flight = 0
    for _ in range(passes) if work.zero >= 2 else ():
        if ends[1] and head_trained:  # then it waits for all reductions before its forward pass
            reducing.settle()
        in_flight = reducing.in_flight_bytes
        for unit in reversed(units):
            reducing.backward(unit)
    kept, freed = _gathered(work, buckets, keep_bytes) if work.zero == 3 else (0, {})

    def gathered(*used: int) -> int:
        return kept + sum({index: size for unit in used for index, size in freed.get(unit, {}).items()}.values())

    after, below = zip(units, [*units[1:], (again or units)[-1]], strict=True), zip(again, [units[0], *again], strict=False)
    forward = Counter({unit: in_flight + gathered(unit, following) for unit, following in after})
    backward = Counter(dict.fromkeys(units, gathered()) | {unit: gathered(unit, following) for unit, following in below})
    return Transfers(forward, reducing.most + backward)


def begun_gradients(work: ModelWork, buckets: list[PlannedBucket], layers: Layers) -> tuple[Transfers, int]:
    """Returns, for a step with one micro-batch, the bytes of those gradients that do not exist before the backward pass, by unit as
    far as they exist when the unit's backward pass is done; and the bytes of all of them."""
    late = [bucket for bucket in buckets if bucket.trained and (bucket.ranks == 1 or work.zero == 0)]
    sizes = [bucket.padded * work.accurate_bytes for bucket in late]
    order = [EMBEDDING, EMBEDDING_NORM, *layers, work.model.layers, work.model.layers + 1]
    begins = [max((order.index(unit) for unit in bucket.units), default=0) for bucket in late]
    backward = {unit: sum(size for size, begin in zip(sizes, begins, strict=True) if begin >= i) for i, unit in enumerate(order)}
    return Transfers(Counter(), Counter(backward)), sum(sizes)


def unit_transfers(work: ModelWork, layers: Layers) -> Transfers:
    """Returns what a rank holds at least for transfers under FSDP2, which has no buckets: the gathered weights of a unit, on an
    accelerator in the backward pass also those of the unit that comes next, and the gradients of the unit, of a layer first those
    of its feed-forward. A rank with several stages keeps gathered weights, which are part of its state. The copies that FSDP2 makes
    for its collectives are not counted."""
    weights, gradients, of_attention, last = Counter[int](), Counter[int](), Counter[int](), work.model.layers
    for name, shape, units in rank_parameters(work, layers):
        part = part_of(work, name, shape)
        for unit in units if part.ranks > 1 else ():
            gradient = part.elements * work.accurate_bytes * (part.name not in work.frozen)
            weights[unit] += part.elements * work.item_bytes * (work.stages == 1)
            gradients[unit] += gradient
            if 0 <= unit < last and LayerPart.ATTENTION.holds(name.split(".", 2)[2]):
                of_attention[unit] += gradient
    weights[last] += weights[last + 1]  # the last norm and the head are one unit
    backward = Counter(
        {i: weights[i] + gradients[i] + weights[i - 1] * (i - 1 in layers and not work.on_cpu) for i in [*layers, last]}
    )
    backward[EMBEDDING] = max(gradients[EMBEDDING], weights[EMBEDDING_NORM] + gradients[EMBEDDING_NORM])
    return Transfers(weights, backward, of_attention)


def reductions_at_the_end(work: ModelWork, buckets: list[PlannedBucket], one_machine: bool) -> int:
    """Returns the bytes that a rank receives from others at the end of a step under ZeRO-0 and 1, where reductions are waited for
    when the last backward pass is done. Gloo's ranks of one machine read partitioned buckets in each other's memory."""
    if not work.on_cpu or work.zero >= 2:
        return 0
    several = [bucket for bucket in buckets if bucket.ranks > 1]  # below ZeRO-3 all are trained
    if work.zero == 0:
        return sum(b.padded * work.accurate_bytes for b in several if b.ranks == 2 and b.padded <= _SENT_WHOLE)
    return 0 if one_machine else sum(b.padded * work.accurate_bytes * (b.ranks - 1) // b.ranks for b in several)


def _gathered(work: ModelWork, buckets: list[PlannedBucket], keep_bytes: int) -> tuple[int, dict[int, dict[int, int]]]:
    """Returns the bytes of gathered weights that stay through a step, as parallel/data/gather.py chooses them, and by unit those
    that are there only for it, by the index of their bucket."""
    kept, freed = 0, dict[int, dict[int, int]]()
    for index, bucket in enumerate(buckets):
        if bucket.partitioned:
            size = bucket.padded * work.item_bytes
            keep_bytes -= size
            if keep_bytes >= 0:
                kept += size
                continue
            for unit in bucket.units:
                freed.setdefault(unit, {})[index] = size
    return kept, freed


class _Reducing:
    """Goes through the backward passes of micro-batches as parallel/data/reducer.py does, and records what is held."""

    def __init__(self, work: ModelWork, buckets: list[PlannedBucket]) -> None:
        self.most = Counter[int]()
        """The most bytes held while each unit computes, in the last backward pass."""
        self._bytes = [bucket.padded * work.accurate_bytes for bucket in buckets]
        self._ranks = [bucket.ranks for bucket in buckets]
        self._pending = [list(bucket.units) for bucket in buckets]
        self._all = [list(bucket.units) for bucket in buckets]
        self._of_unit: dict[int, list[int]] = {}
        for index, bucket in enumerate(buckets):
            for unit in dict.fromkeys(bucket.units):
                self._of_unit.setdefault(unit, []).append(index)
        self._begun_bytes = 0
        """Of the buckets to which some of their gradients have been added."""
        self._limit = max(self._bytes, default=0) + _MOST_IN_FLIGHT * (median_high(self._bytes) if self._bytes else 0)
        self._receives = work.on_cpu  # elsewhere the sum is computed where the gradients are
        self._in_flight: deque[int] = deque()

    def _held(self, index: int) -> int:
        """Returns the bytes of a bucket in reduction: its gradients, and those of its shard that other ranks have sent."""
        size, ranks = self._bytes[index], self._ranks[index]
        return size + self._receives * (ranks - 1) * size // ranks

    @property
    def in_flight_bytes(self) -> int:
        return sum(map(self._held, self._in_flight))

    def backward(self, unit: int) -> None:
        self.most[unit] = self.in_flight_bytes
        for index in self._of_unit.get(unit, ()):
            pending = self._pending[index]
            while unit in pending:
                if len(pending) == len(self._all[index]):
                    self._make_room(self._bytes[index])
                    self._begun_bytes += self._bytes[index]
                pending.remove(unit)
                self._record(unit)
                if not pending:
                    self._pending[index] = list(self._all[index])
                    self._begun_bytes -= self._bytes[index]
                    if len(self._in_flight) == _MOST_IN_FLIGHT:
                        self._in_flight.popleft()
                    self._in_flight.append(index)
                    self._record(unit)
                    break

    def settle(self) -> None:
        self._in_flight.clear()

    def _make_room(self, size: int) -> None:
        while self._in_flight and size + sum(self._bytes[index] for index in self._in_flight) > self._limit:
            self._in_flight.popleft()

    def _record(self, unit: int) -> None:
        self.most[unit] = max(self.most[unit], self._begun_bytes + self.in_flight_bytes)

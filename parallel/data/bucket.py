"""Flat buckets of weights and gradients, and their partition over the data ranks under ZeRO-1, 2 and 3.

Parameters with equal properties for reduction, norm and update (`BucketKind`) share buckets. A bucket is a flat tensor of working
weights and a flat tensor of gradients; this rank's shard is a slice of both. So reduction, norm and optimizer work on a few large
tensors, and a rank's part of the optimizer state is contiguous (ZeRO, arXiv 1910.02054, stage 1; the flat layout is that of
Megatron-LM's distributed optimizer).

Gradients are kept in at least float32, so sums over micro-batches and ranks do not lose what bfloat16 would round away. The
gradient of a single micro-batch is as accurate as the chip's matrix product, since kernels add it straight to the bucket; a
compiled layer returns it in the weight's dtype.
"""

from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch

from bagualu.comm.backend import Work
from bagualu.comm.group import Group
from bagualu.parallel.boxes import Box
from bagualu.parallel.mesh import Mesh
from bagualu.parallel.precision import accurate_dtype
from bagualu.parallel.sharding import ShardingPlan

_SHARD_MULTIPLE = 8
"""Number of elements of which every shard's bounds are a multiple, so that a shard of any dtype can be read as 64-bit integers."""


@dataclass(frozen=True)
class BucketKind:
    """The properties that all parameters of a bucket share."""

    reduction_axis: str
    """The mesh axis over which gradients are summed and, with ZeRO, optimizer state is partitioned."""
    partial_over: str | None
    """An axis along which each rank computes only a part of the gradient, which is therefore summed over this axis first; None if
    there is no such axis."""
    tied: bool
    """Whether the first and the last stage hold the parameter on different ranks, so that its gradient is summed over both."""
    copied_over: str | None
    """A further axis along which ranks hold the same elements and, after the reductions, the same gradient; None if there is
    none."""
    counted: bool
    """Whether the gradient norm and checkpoints include this rank's copy of the parameters rather than a copy on another stage or
    tensor rank."""
    trained: bool
    """Whether the parameters have gradients."""
    treatment: Hashable
    """How the optimizer treats the parameters; it alone knows what this means."""


@dataclass(frozen=True)
class Entry:
    """A parameter's range in its bucket: elements start .. start + parameter.numel() - 1 of the flat tensors."""

    name: str
    parameter: torch.nn.Parameter
    global_shape: tuple[int, ...]
    """The shape of the global tensor, without padding."""
    box: Box
    """The part of the global tensor that this rank holds, including padding."""
    start: int
    uses: int
    """Number of gradients that each micro-batch adds to the bucket for this parameter: 2 if the embedding and the head of this rank
    are the same tensor, else 1."""


@dataclass
class Bucket:
    """Parameters that are reduced and updated together. This rank's shard is its part of a partitioned bucket, else all of it."""

    kind: BucketKind
    group: Group
    """The ranks that hold the same elements and process different samples."""
    entries: list[Entry]
    partitioned: bool
    weights: torch.Tensor
    """The working weights. If `kept` is not None, they have memory only while they are used (gather.py)."""
    gradients: torch.Tensor
    """The gradients of this rank. If `reduced` is not None, they exist only while those of a micro-batch are being added, and are
    empty in between. In a step with one micro-batch, those of a bucket that is not partitioned are empty until one is added."""
    reduced: torch.Tensor | None = None
    """Under ZeRO-2 and 3, this rank's shard of the gradients of all ranks, summed over the micro-batches so far. None: the
    gradients of all micro-batches are added to `gradients`, and the shard is a part of them."""
    kept: torch.Tensor | None = None
    """Under ZeRO-3, this rank's shard of the working weights, all that stays of them. None: the shard is a part of `weights`."""
    lent: bool = False
    """Whether other ranks read the gradients in this rank's memory (see `Group.lend`)."""
    pending: int = 0
    """The number of gradients that are still to be added to this bucket before its next reduction."""
    reductions: int = 0
    """Under ZeRO-2 and 3, the number of reductions, one for each micro-batch, that are still to begin in this step."""
    work: list[Work] = field(default_factory=list)
    """The reductions of this bucket in progress."""

    @property
    def treatment(self) -> Hashable:
        return self.kind.treatment

    @property
    def shard(self) -> slice:
        """The range of this rank's shard in the flat tensors: all of them unless the bucket is partitioned."""
        numel = self.weights.numel()
        part = numel // self.group.size if self.partitioned else numel
        begin = part * self.group.rank if self.partitioned else 0
        return slice(begin, begin + part)

    @property
    def shard_weights(self) -> torch.Tensor:
        return self.weights[self.shard] if self.kept is None else self.kept

    @property
    def shard_gradients(self) -> torch.Tensor:
        return self.gradients[self.shard] if self.reduced is None else self.reduced

    @property
    def owned(self) -> bool:
        """Whether this rank's copy of the shard is the one that the gradient norm includes and checkpoints save."""
        return self.kind.counted and (self.partitioned or self.group.rank == 0)

    def shard_entries(self) -> Iterator[tuple[Entry, int, int, int]]:
        """Yields (entry, first element in the shard, first element in the flattened parameter, number of elements) for the part of
        every parameter that lies in the shard."""
        begin, end = self.shard.start, self.shard.stop
        for entry in self.entries:
            low, high = max(begin, entry.start), min(end, entry.start + entry.parameter.numel())
            if low < high:
                yield entry, low - begin, low - entry.start, high - low


def build_buckets(
    parameters: Sequence[tuple[str, torch.nn.Parameter]],
    plan: ShardingPlan,
    mesh: Mesh,
    zero: int,
    bucket_bytes: int,
    uses: Callable[[torch.nn.Parameter], int] = lambda _: 1,
    treat: Callable[[str, torch.nn.Parameter], Hashable] = lambda name, parameter: None,
) -> list[Bucket]:
    """Moves parameters, given with their names on this rank, into flat buckets, of which they become views.

    Parameters need `global_shape` and `box` (see parallelize.py). They are visited last to first, roughly the order in which the
    backward pass finishes them. The buckets are the same on every rank of a group, because plan and order are the same. `uses`
    returns `Entry.uses` of a parameter, `treat` its `BucketKind.treatment`, given its global name. Frozen parameters get buckets
    under ZeRO-3, which divides their weights; under other stages they stay as they are.
    """
    open_buckets: dict[BucketKind, list[tuple[str, torch.nn.Parameter]]] = {}
    buckets: list[Bucket] = []
    for local_name, parameter in reversed(parameters):
        if not parameter.requires_grad and zero < 3:
            continue
        name = plan.global_name(local_name)
        trained = parameter.requires_grad
        kind = kind_of(name, local_name, treat(name, parameter) if trained else None, plan, mesh, trained)
        members = open_buckets.setdefault(kind, [])
        members.append((name, parameter))
        if sum(p.numel() for _, p in members) * accurate_dtype(parameter.dtype).itemsize >= bucket_bytes:
            buckets.append(_build(kind, open_buckets.pop(kind), mesh, zero, uses))
    buckets.extend(_build(kind, members, mesh, zero, uses) for kind, members in open_buckets.items())
    return buckets


def kind_of(name: str, local_name: str, treatment: Hashable, plan: ShardingPlan, mesh: Mesh, trained: bool = True) -> BucketKind:
    """Returns the kind of the parameter `name`, on this rank `local_name`."""
    placement = plan.placement(name)
    tied = name in plan.tied.values() and "ends" in mesh.groups and mesh.group("ends").size > 1
    copy_elsewhere = tied and local_name != name
    return BucketKind(
        reduction_axis=placement.reduction_axis,
        partial_over=placement.partial_over if placement.partial_over and mesh.group(placement.partial_over).size > 1 else None,
        tied=tied,
        copied_over="tensor" if "tensor" not in placement.axes and mesh.group("tensor").size > 1 else None,
        counted=placement.counted(mesh.layout, mesh.coordinates) and not copy_elsewhere,
        trained=trained,
        treatment=treatment,
    )


def _build(
    kind: BucketKind,
    members: list[tuple[str, torch.nn.Parameter]],
    mesh: Mesh,
    zero: int,
    uses: Callable[[torch.nn.Parameter], int],
) -> Bucket:
    group = mesh.group(kind.reduction_axis)
    partitioned = zero >= 1 and group.size > 1
    first = members[0][1]
    numel = sum(parameter.numel() for _, parameter in members)
    whole = group.size * _SHARD_MULTIPLE
    padded = -(-numel // whole) * whole
    weights = torch.zeros(padded, dtype=first.dtype, device=first.device)
    sharded = kind.trained and zero >= 2 and partitioned and not crosses_two_groups(kind)
    dtype = accurate_dtype(first.dtype)
    gradients = torch.zeros(padded if kind.trained and not sharded else 0, dtype=dtype, device=first.device)
    reduced = torch.zeros(padded // group.size, dtype=dtype, device=first.device) if sharded else None
    entries, start = [], 0
    for name, parameter in members:
        view = weights[start : start + parameter.numel()].view_as(parameter)
        view.copy_(parameter.detach())
        parameter.data = view
        if kind.trained:
            parameter.grad_dtype = gradients.dtype  # otherwise autograd rounds float32 sums of kernels to the weight's dtype
        shape, box = parameter.global_shape, parameter.box  # type: ignore[attr-defined]
        entries.append(Entry(name, parameter, shape, box, start, uses(parameter)))
        start += parameter.numel()
    bucket = Bucket(kind, group, entries, partitioned, weights, gradients, reduced)
    if zero == 3 and partitioned:
        bucket.kept = bucket.shard_weights.clone()
        weights.untyped_storage().resize_(0)
    return bucket


def crosses_two_groups(kind: BucketKind) -> bool:
    """Returns whether the bucket is also reduced over a second group. Such buckets are reduced last, in the same order on every
    rank, so that no two ranks wait for each other in different groups."""
    return kind.tied or kind.partial_over is not None


@contextmanager
def gathering() -> Iterator[Callable[[Bucket], None]]:
    """Yields what starts to gather the updated shards of a bucket; when the context ends, every rank has all its working weights
    again. It does nothing for buckets that are not partitioned, and under ZeRO-3, which gathers weights when they are used.
    Collective."""
    works = []

    def gather(bucket: Bucket) -> None:
        if bucket.partitioned and bucket.kept is None:
            works.append(bucket.group.all_gather(bucket.weights, bucket.shard_weights, asynchronous=True))

    yield gather
    for work in works:
        work.wait()

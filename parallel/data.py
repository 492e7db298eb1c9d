"""Data parallelism: flat gradient buckets that are reduced during the backward pass, and their partition under ZeRO-1 and ZeRO-2.

Parameters with equal properties for reduction, norm and update (`BucketKind`) share buckets. A bucket is a flat tensor of working
weights and a flat tensor of gradients; this rank's shard is a slice of both. So reduction, norm and optimizer work on a few large
tensors, and a rank's part of the optimizer state is contiguous (ZeRO, arXiv 1910.02054, stage 1; the flat layout is that of
Megatron-LM's distributed optimizer).

Gradients are kept in at least float32, so sums over micro-batches and ranks do not lose what bfloat16 would round away. The
gradient of a single micro-batch is as accurate as the chip's matrix product, since kernels add it straight to the bucket; a
compiled layer returns it in the weight's dtype.
"""

from collections import deque
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial

import torch
from torch.utils.hooks import RemovableHandle

from bagualu.comm.backend import Work
from bagualu.comm.group import Group
from bagualu.comm.monitor import Phase
from bagualu.parallel.boxes import Box
from bagualu.parallel.mesh import Mesh
from bagualu.parallel.precision import accurate_dtype, on_nvidia
from bagualu.parallel.sharding import ShardingPlan

_NORM_PIECE = 2**10
_MOST_IN_FLIGHT = 2
"""The number of reductions under ZeRO-2 that may be in progress at the same time."""
_SHARD_MULTIPLE = 8
"""Number of elements of which every shard's bounds are a multiple, so that a shard of any dtype can be read as 64-bit integers."""


@dataclass(frozen=True)
class BucketKind:
    """The properties that all parameters of a bucket share."""

    reduction_axis: str
    """The mesh axis over which gradients are summed and, under ZeRO-1, optimizer state is partitioned."""
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
    gradients: torch.Tensor
    """The gradients of this rank. If `reduced` is not None, they exist only while those of a micro-batch are being added, and are
    empty in between."""
    reduced: torch.Tensor | None = None
    """Under ZeRO-2, this rank's shard of the gradients of all ranks, summed over the micro-batches so far. None: the gradients of
    all micro-batches are added to `gradients`, and the shard is a part of them."""
    lent: bool = False
    """Whether other ranks read the gradients in this rank's memory (see `Group.lend`)."""
    pending: int = 0
    """The number of gradients that are still to be added to this bucket before its next reduction."""
    reductions: int = 0
    """Under ZeRO-2, the number of reductions, one for each micro-batch, that are still to begin in this step."""
    work: list[Work] = field(default_factory=list)
    """The reductions of this bucket in progress."""

    @property
    def shard(self) -> slice:
        """The range of this rank's shard in the flat tensors: all of them unless the bucket is partitioned."""
        numel = self.weights.numel()
        part = numel // self.group.size if self.partitioned else numel
        begin = part * self.group.rank if self.partitioned else 0
        return slice(begin, begin + part)

    @property
    def shard_weights(self) -> torch.Tensor:
        return self.weights[self.shard]

    @property
    def shard_gradients(self) -> torch.Tensor:
        return self.gradients[self.shard] if self.reduced is None else self.reduced

    def norm_squared(self) -> torch.Tensor:
        """Returns the squared norm of the shard's gradient, a float64 scalar.

        It sums float32 norms of short pieces in float64. So it loses no digits and does not depend on the number of threads.
        """
        whole = self.shard_gradients.numel() // _NORM_PIECE * _NORM_PIECE
        pieces = torch.linalg.vector_norm(self.shard_gradients[:whole].view(-1, _NORM_PIECE), dim=1)
        rest = torch.linalg.vector_norm(self.shard_gradients[whole:])
        squared: torch.Tensor = pieces.double().square().sum() + rest.double().square()
        return squared

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
    model: torch.nn.Module,
    plan: ShardingPlan,
    mesh: Mesh,
    zero: int,
    bucket_bytes: int,
    uses: Callable[[torch.nn.Parameter], int] = lambda _: 1,
    treat: Callable[[str, torch.nn.Parameter], Hashable] = lambda name, parameter: None,
) -> list[Bucket]:
    """Moves the model's parameters, except frozen ones, into flat buckets; the parameters become views of them.

    Parameters need `global_shape` and `box` (see parallelize.py). They are visited last to first, roughly the order in which the
    backward pass finishes them. The buckets are the same on every rank of a group, because plan and order are the same. `uses`
    returns `Entry.uses` of a parameter, `treat` its `BucketKind.treatment`, given its global name.
    """
    open_buckets: dict[BucketKind, list[tuple[str, torch.nn.Parameter]]] = {}
    buckets: list[Bucket] = []
    for local_name, parameter in reversed([named for named in model.named_parameters() if named[1].requires_grad]):
        name = plan.global_name(local_name)
        kind = _kind(name, local_name, treat(name, parameter), plan, mesh)
        members = open_buckets.setdefault(kind, [])
        members.append((name, parameter))
        if sum(p.numel() for _, p in members) * accurate_dtype(parameter.dtype).itemsize >= bucket_bytes:
            buckets.append(_build(kind, open_buckets.pop(kind), mesh, zero, uses))
    buckets.extend(_build(kind, members, mesh, zero, uses) for kind, members in open_buckets.items())
    return buckets


def _kind(name: str, local_name: str, treatment: Hashable, plan: ShardingPlan, mesh: Mesh) -> BucketKind:
    placement = plan.placement(name)
    tied = name in plan.tied.values() and "ends" in mesh.groups and mesh.group("ends").size > 1
    copy_elsewhere = tied and local_name != name
    return BucketKind(
        reduction_axis=placement.reduction_axis,
        partial_over=placement.partial_over if placement.partial_over and mesh.group(placement.partial_over).size > 1 else None,
        tied=tied,
        copied_over="tensor" if "tensor" not in placement.axes and mesh.group("tensor").size > 1 else None,
        counted=placement.counted(mesh.layout, mesh.coordinates) and not copy_elsewhere,
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
    sharded = zero >= 2 and partitioned and not _crosses_two_groups(kind)
    dtype = accurate_dtype(first.dtype)
    gradients = torch.zeros(0 if sharded else padded, dtype=dtype, device=first.device)
    reduced = torch.zeros(padded // group.size, dtype=dtype, device=first.device) if sharded else None
    entries, start = [], 0
    for name, parameter in members:
        view = weights[start : start + parameter.numel()].view_as(parameter)
        view.copy_(parameter.detach())
        parameter.data = view
        parameter.grad_dtype = gradients.dtype  # otherwise autograd rounds float32 sums of kernels to the weight's dtype
        shape, box = parameter.global_shape, parameter.box  # type: ignore[attr-defined]
        entries.append(Entry(name, parameter, shape, box, start, uses(parameter)))
        start += parameter.numel()
    return Bucket(kind, group, entries, partitioned, weights, gradients, reduced)


class GradientReducer:
    """Adds the gradients of a step's micro-batches to the buckets, and reduces the buckets: most during the backward pass, once
    they and all earlier ones are complete."""

    def __init__(self, buckets: list[Bucket], mesh: Mesh, fused: Callable[[str], bool] = lambda _: False) -> None:
        """`fused` returns whether the kernels of the parameter with this name add its gradient straight to the bucket
        (`gradient_sink`)."""
        self.buckets = buckets
        self.mesh = mesh
        self.put_off: list[Callable[[], None]] | None = None
        """Functions that compute the weight gradients deferred so far; None outside `putting_off`, where no gradient is
        deferred."""
        self.before_reduction: Callable[[torch.Tensor], None] | None = None
        """Called with each bucket's gradients when this rank's are complete and before other ranks' are added; None: no call."""
        self._sinks: list[GradientSink] = []
        self._handles: list[RemovableHandle] = []
        self._reduced_early = [bucket for bucket in buckets if bucket.reduced is None and not _crosses_two_groups(bucket.kind)]
        """The buckets whose reduction starts during the backward pass, in order: each as soon as it and all earlier ones are
        complete."""
        self._begun = 0
        """How many buckets of `_reduced_early` have begun their reduction in this step's backward passes."""
        self._sharded = [bucket for bucket in buckets if bucket.reduced is not None]
        self._in_flight: deque[tuple[Bucket, Work, torch.Tensor, torch.Tensor]] = deque()
        """Reductions of `_sharded` in progress, oldest first: (bucket, work, its result, the gradients that it reads)."""
        self._sinks_of: dict[int, list[tuple[Entry, GradientSink]]] = {}
        """The sinks of each bucket, by the bucket's id."""
        for bucket in buckets:
            for entry in bucket.entries:
                sink = GradientSink(self, bucket, _gradient_of(entry, bucket))
                self._sinks_of.setdefault(id(bucket), []).append((entry, sink))
                self._handles.append(entry.parameter.register_post_accumulate_grad_hook(sink.take))
                if fused(entry.name):
                    entry.parameter.gradient_sink = sink  # type: ignore[attr-defined]
                self._sinks.append(sink)

    def lend(self) -> None:
        """Where possible, lets the other ranks read the gradients of partitioned buckets in this rank's memory, so that their
        reduction sends no gradients.

        All ranks of a group call this between steps, for their buckets in the same order.
        """
        for bucket in self.buckets:
            lends = bucket.partitioned and bucket.reduced is None
            lent = bucket.group.lend(bucket.gradients.numel(), bucket.gradients.dtype) if lends else None
            if lent is not None:
                bucket.gradients, bucket.lent = lent, True
        parameters = ((entry, bucket) for bucket in self.buckets for entry in bucket.entries)
        for sink, (entry, bucket) in zip(self._sinks, parameters, strict=True):
            sink.view = _gradient_of(entry, bucket)

    def begin(self, micro_batches: int) -> None:
        """Prepares for a step with `micro_batches` backward passes for each parameter. Call it before the first backward pass."""
        for sink in self._sinks:
            sink.fresh = True
        self._begun = 0
        for bucket in self.buckets:
            bucket.pending = sum(entry.uses for entry in bucket.entries)
            if bucket.reduced is None:
                bucket.pending *= micro_batches
            else:
                bucket.reductions = micro_batches
                bucket.reduced.zero_()

    def finish(self) -> None:
        """Finishes all reductions; call it after the last backward pass. Then `shard_gradients` of every bucket is the gradient
        summed over micro-batches and ranks."""
        for sink in self._sinks:
            if sink.fresh:  # its parameter took no part in this step's loss
                sink.view.zero_()
        for bucket in self._reduced_early[self._begun :]:
            self._reduce(bucket)
        for bucket in self._sharded:
            while bucket.reductions:
                self._reduce_part(bucket)
        while self._in_flight:
            self._add_oldest()
        for bucket in self.buckets:
            if _crosses_two_groups(bucket.kind):
                self._reduce(bucket)
        for bucket in self.buckets:
            for work in bucket.work:
                work.wait()
            bucket.work.clear()
        for group in {id(bucket.group): bucket.group for bucket in self.buckets if bucket.lent}.values():
            group.barrier()  # after this, every rank may write to the gradients it lends

    @contextmanager
    def putting_off(self) -> Iterator[list[Callable[[], None]]]:
        """Within this context, sinks defer the gradients of weights. Yields the list to which they add the functions that compute
        these gradients."""
        self.put_off = []
        try:
            yield self.put_off
        finally:
            self.put_off = None

    def count(self, bucket: Bucket) -> None:
        """Records that a gradient of a parameter was added to `bucket`, and starts the reductions that have become possible.

        Reductions begin in the order of the buckets, not of their completion, since ranks with different numbers of micro-batches
        complete them in different orders.
        """
        bucket.pending -= 1
        if bucket.reduced is not None:
            if bucket.pending == 0:
                self._reduce_part(bucket)
            return
        while self._begun < len(self._reduced_early) and self._reduced_early[self._begun].pending == 0:
            self._begun += 1
            self._reduce(self._reduced_early[self._begun - 1])

    def close(self) -> None:
        """Removes the hooks. They connect parameters and buckets in reference cycles that Python's garbage collector cannot see."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        for bucket in self.buckets:
            for entry in bucket.entries:
                if gradient_sink(entry.parameter) is not None:
                    del entry.parameter.gradient_sink  # type: ignore[attr-defined]

    def prepare(self, bucket: Bucket) -> None:
        """Allocates the gradients of a bucket that has none. Call before a gradient is added to it."""
        if bucket.reduced is not None and not bucket.gradients.numel():
            bucket.gradients = bucket.reduced.new_empty(bucket.weights.numel())
            last = bucket.entries[-1]
            bucket.gradients[last.start + last.parameter.numel() :] = 0  # padding
            for entry, sink in self._sinks_of[id(bucket)]:
                sink.view, sink.fresh = _gradient_of(entry, bucket), True

    def _reduce_part(self, bucket: Bucket) -> None:
        """Starts to reduce the gradients that were added since the bucket's last reduction, and releases them afterwards.

        Ranks of a group have the same number of micro-batches and add gradients in the same order, so they reduce in the same
        order. At most two reductions are in progress, so that only two buckets' gradients are held besides those being added.
        """
        assert bucket.reduced is not None
        self.mesh.monitor.at(Phase.BUCKET)
        self.prepare(bucket)
        for _, sink in self._sinks_of[id(bucket)]:
            if sink.fresh:
                sink.view.zero_()
                sink.fresh = False
            sink.view = bucket.reduced[:0]  # otherwise it would keep the gradients alive
        if self.before_reduction is not None:
            self.before_reduction(bucket.gradients)
        if len(self._in_flight) == _MOST_IN_FLIGHT:
            self._add_oldest()
        result = torch.empty_like(bucket.reduced)
        work = bucket.group.reduce_scatter(result, bucket.gradients, asynchronous=True)
        self._in_flight.append((bucket, work, result, bucket.gradients))
        bucket.gradients = bucket.reduced[:0]
        bucket.reductions -= 1
        bucket.pending = sum(entry.uses for entry in bucket.entries)

    def _add_oldest(self) -> None:
        bucket, work, result, _ = self._in_flight.popleft()
        work.wait()
        assert bucket.reduced is not None
        bucket.reduced.add_(result)

    def _reduce(self, bucket: Bucket) -> None:
        self.mesh.monitor.at(Phase.BUCKET)
        if self.before_reduction is not None:
            self.before_reduction(bucket.gradients)
        if bucket.kind.tied:
            self.mesh.group("ends").all_reduce(bucket.gradients)
        if bucket.kind.partial_over:
            self.mesh.group(bucket.kind.partial_over).all_reduce(bucket.gradients)
        if bucket.partitioned:
            bucket.work.append(bucket.group.reduce_scatter(bucket.shard_gradients, bucket.gradients, asynchronous=True))
        elif bucket.group.size > 1:
            bucket.work.append(bucket.group.all_reduce(bucket.gradients, asynchronous=True))


def _gradient_of(entry: Entry, bucket: Bucket) -> torch.Tensor:
    if not bucket.gradients.numel():
        return bucket.gradients
    return bucket.gradients[entry.start : entry.start + entry.parameter.numel()].view_as(entry.parameter)


@dataclass
class GradientSink:
    """Adds a parameter's gradients to `view`, the parameter's part of its bucket, in the parameter's shape."""

    reducer: GradientReducer
    bucket: Bucket
    view: torch.Tensor
    fresh: bool = False
    """Whether no gradient of this step has been added to `view` yet; then it still holds old values, which the first gradient
    overwrites."""

    def take(self, parameter: torch.Tensor) -> None:
        """Adds the gradient that autograd has accumulated, if any, to the bucket and drops it. This is the parameter's hook."""
        if parameter.grad is None:
            return
        self.add(parameter.grad)
        parameter.grad = None

    def add_products(self, lefts: Sequence[torch.Tensor], rights: Sequence[torch.Tensor]) -> None:
        """Adds left @ right, the gradient of a matrix [O, I]; for E matrices [E, O, I], adds a product to each. Where possible, the
        products are neither rounded nor copied."""
        self._run_or_defer(partial(self._add_products, lefts, rights))

    def add_rows(self, rows: torch.Tensor, indices: torch.Tensor) -> None:
        """Adds rows [N, H] to the rows `indices` [N] of the gradient of a matrix [V, H]."""
        self._run_or_defer(partial(self._add_rows, rows, indices))

    def add_computed(self, compute: Callable[[], torch.Tensor]) -> None:
        """Adds the gradient, in the parameter's shape, that `compute` returns."""
        self._run_or_defer(lambda: self._add(compute()))

    def add(self, gradient: torch.Tensor, factor: torch.Tensor | None = None) -> None:
        """Adds an existing gradient, in the parameter's shape, times an optional scalar. This is never deferred."""
        self.reducer.prepare(self.bucket)
        if factor is None:
            self._add(gradient)
        elif self.fresh:
            self.view.copy_(gradient).mul_(factor)
        else:
            self.view.addcmul_(gradient, factor)
        self._counted()

    def _add(self, gradient: torch.Tensor) -> None:
        self.view.copy_(gradient) if self.fresh else self.view.add_(gradient)

    def _run_or_defer(self, work: Callable[[], None]) -> None:
        def run() -> None:
            self.reducer.prepare(self.bucket)
            work()
            self._counted()

        if self.reducer.put_off is None:
            run()
        else:
            self.reducer.put_off.append(run)

    def _add_products(self, lefts: Sequence[torch.Tensor], rights: Sequence[torch.Tensor]) -> None:
        views = self.view.unsqueeze(0) if self.view.ndim == 2 else self.view
        for view, left, right in zip(views, lefts, rights, strict=True):
            if left.dtype == view.dtype:
                torch.addmm(view, left, right, beta=0 if self.fresh else 1, out=view)
            elif on_nvidia(view):  # its matrix product can return the float32 sums before they are rounded
                torch.addmm(view, left, right, out_dtype=view.dtype, beta=0 if self.fresh else 1, out=view)
            elif self.fresh:
                view.copy_(left @ right)
            else:
                view.add_(left @ right)

    def _add_rows(self, rows: torch.Tensor, indices: torch.Tensor) -> None:
        if self.fresh:
            self.view.zero_()
        self.view.index_add_(0, indices, rows.to(self.view.dtype))

    def _counted(self) -> None:
        self.fresh = False
        self.reducer.count(self.bucket)


def gradient_sink(parameter: torch.Tensor) -> GradientSink | None:
    """Returns the sink that receives the gradient of `parameter`; None if autograd accumulates it."""
    return getattr(parameter, "gradient_sink", None)


def _crosses_two_groups(kind: BucketKind) -> bool:
    """Returns whether the bucket is also reduced over a second group. Such buckets are reduced last, in the same order on every
    rank, so that no two ranks wait for each other in different groups."""
    return kind.tied or kind.partial_over is not None


def gather_weights(buckets: list[Bucket]) -> None:
    """Gathers the updated shards of partitioned buckets, so that every rank has all working weights again. Collective."""
    works = []
    for bucket in buckets:
        if bucket.partitioned:
            works.append(bucket.group.all_gather(bucket.weights, bucket.shard_weights, asynchronous=True))
    for work in works:
        work.wait()

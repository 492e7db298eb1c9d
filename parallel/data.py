"""Data parallel: flat gradient buckets, reduced while the backward pass is still running, and ZeRO-1's partition of them.

Parameters that are alike in every way that matters to reduction, norm and update (`BucketKind`) share buckets. A bucket is one
flat piece of working weights, one flat piece of gradients, and this rank's shard of both. So reduction, norm and optimizer
work on a few large tensors, and a rank's part of the optimizer state is one contiguous piece (ZeRO, arXiv 1910.02054, stage 1;
the flat layout is that of Megatron-LM's distributed optimizer).

Gradients are kept in at least float32: sums over micro-batches and ranks do not lose what bfloat16 would round away. One
micro-batch's own gradient is as accurate as the chip's matrix product, which kernels add straight into the bucket; a compiled layer
hands it over in the weight's dtype.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial

import torch
from torch.utils.hooks import RemovableHandle

from bagualu.comm.backend import Work
from bagualu.comm.group import Group
from bagualu.parallel.boxes import Box
from bagualu.parallel.mesh import Mesh
from bagualu.parallel.precision import accurate_dtype, on_nvidia
from bagualu.parallel.sharding import ShardingPlan

_NORM_PIECE = 2**10
_SHARD_MULTIPLE = 8
"""Elements. Every shard begins and ends at a whole number of 64-bit words, whatever its dtype, and can be read as such."""


@dataclass(frozen=True)
class BucketKind:
    """What the parameters of one bucket have in common."""

    reduction_axis: str
    partial_over: str | None
    tied: bool
    copied_over: str | None
    """The axis along which other ranks hold the same elements and compute the same gradient, beside the reduction axis."""
    counted: bool
    """Whether this rank's copy counts in the norm and in checkpoints, among the copies on other stages or tensor ranks."""
    decayed: bool


@dataclass(frozen=True)
class Entry:
    """One parameter in its bucket: elements start .. start + parameter.numel() of the flat tensors."""

    name: str
    parameter: torch.nn.Parameter
    global_shape: tuple[int, ...]
    box: Box
    start: int
    uses: int
    """Gradients that a micro-batch gives it: 2 where the embedding and the head of this rank are one tensor."""


@dataclass
class Bucket:
    """Parameters that are reduced and updated together. The shard is this rank's part: all of it unless partitioned."""

    kind: BucketKind
    group: Group
    """Ranks that hold the same elements and saw different samples."""
    entries: list[Entry]
    partitioned: bool
    weights: torch.Tensor
    gradients: torch.Tensor
    lent: bool = False
    """Whether the others read the gradients where they lie."""
    pending: int = 0
    work: list[Work] = field(default_factory=list)

    @property
    def shard(self) -> slice:
        """Where this rank's part lies in the flat tensors."""
        numel = self.weights.numel()
        part = numel // self.group.size if self.partitioned else numel
        begin = part * self.group.rank if self.partitioned else 0
        return slice(begin, begin + part)

    @property
    def shard_weights(self) -> torch.Tensor:
        return self.weights[self.shard]

    @property
    def shard_gradients(self) -> torch.Tensor:
        return self.gradients[self.shard]

    def norm_squared(self) -> torch.Tensor:
        """Squared norm of the shard's gradient, a float64 scalar: float32 sums over pieces short enough not to lose digits, so
        that it depends neither on the size of buckets nor on the number of threads."""
        whole = self.shard_gradients.numel() // _NORM_PIECE * _NORM_PIECE
        pieces = torch.linalg.vector_norm(self.shard_gradients[:whole].view(-1, _NORM_PIECE), dim=1)
        rest = torch.linalg.vector_norm(self.shard_gradients[whole:])
        squared: torch.Tensor = pieces.double().square().sum() + rest.double().square()
        return squared

    @property
    def owned(self) -> bool:
        """Whether this rank's shard is the one that counts (norm) and is saved (checkpoint)."""
        return self.kind.counted and (self.partitioned or self.group.rank == 0)

    def shard_entries(self) -> Iterator[tuple[Entry, int, int, int]]:
        """(entry, start in the shard, start in the parameter, elements) for every parameter that the shard touches."""
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
) -> list[Bucket]:
    """Move the model's parameters into flat buckets and leave views of them behind.

    Parameters carry `global_shape` and `box` (see apply.py). Walked last to first, which is about the order in which the
    backward pass finishes them. The same on every rank of a group, because the plan and the order are. `uses`: see `Entry`.
    """
    open_buckets: dict[BucketKind, list[tuple[str, torch.nn.Parameter]]] = {}
    buckets: list[Bucket] = []
    for local_name, parameter in reversed(list(model.named_parameters())):
        name = plan.global_name(local_name)
        kind = _kind(name, local_name, parameter, plan, mesh)
        members = open_buckets.setdefault(kind, [])
        members.append((name, parameter))
        if sum(p.numel() for _, p in members) * accurate_dtype(parameter.dtype).itemsize >= bucket_bytes:
            buckets.append(_build(kind, open_buckets.pop(kind), mesh, zero, uses))
    buckets.extend(_build(kind, members, mesh, zero, uses) for kind, members in open_buckets.items())
    return buckets


def _kind(name: str, local_name: str, parameter: torch.nn.Parameter, plan: ShardingPlan, mesh: Mesh) -> BucketKind:
    placement = plan.placement(name)
    tied = name in plan.tied.values() and "ends" in mesh.groups and mesh.group("ends").size > 1
    copy_elsewhere = tied and local_name != name
    return BucketKind(
        reduction_axis=placement.reduction_axis,
        partial_over=placement.partial_over if placement.partial_over and mesh.group(placement.partial_over).size > 1 else None,
        tied=tied,
        copied_over="tensor" if "tensor" not in placement.axes and mesh.group("tensor").size > 1 else None,
        counted=placement.counted(mesh.layout, mesh.coordinates) and not copy_elsewhere,
        decayed=parameter.ndim >= 2,
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
    gradients = torch.zeros(padded, dtype=accurate_dtype(first.dtype), device=first.device)
    entries, start = [], 0
    for name, parameter in members:
        view = weights[start : start + parameter.numel()].view_as(parameter)
        view.copy_(parameter.detach())
        parameter.data = view
        parameter.grad_dtype = gradients.dtype  # so that what a kernel sums up in float32 is not rounded on its way here
        shape, box = parameter.global_shape, parameter.box  # type: ignore[attr-defined]
        entries.append(Entry(name, parameter, shape, box, start, uses(parameter)))
        start += parameter.numel()
    return Bucket(kind, group, entries, partitioned, weights, gradients)


class GradientReducer:
    """Collects gradients of a step's micro-batches into the buckets, and starts reducing a bucket when its last one is in."""

    def __init__(self, buckets: list[Bucket], mesh: Mesh, fused: Callable[[str], bool] = lambda _: False) -> None:
        """`fused`: of which parameters, by name, kernels that know `gradient_sink` put the gradient straight into the bucket."""
        self.buckets = buckets
        self.mesh = mesh
        self.put_off: list[Callable[[], None]] | None = None
        """Where sinks leave what they would have computed, while it is put off."""
        self.before_reduction: Callable[[Bucket], None] | None = None
        """Told of every bucket when this rank's own gradient is complete in it and nobody else's has been added."""
        self._sinks: list[GradientSink] = []
        self._handles: list[RemovableHandle] = []
        self._at_once = [bucket for bucket in buckets if not _waits_for_all(bucket)]
        self._begun = 0
        """How many of these are being reduced."""
        for bucket in buckets:
            for entry in bucket.entries:
                sink = GradientSink(self, bucket, _gradient_of(entry, bucket))
                self._handles.append(entry.parameter.register_post_accumulate_grad_hook(sink.take))
                if fused(entry.name):
                    entry.parameter.gradient_sink = sink  # type: ignore[attr-defined]
                self._sinks.append(sink)

    def lend(self) -> None:
        """Let the other ranks of a partitioned bucket read its gradients where they lie, if they can: then nothing of them is sent.
        Collective, in the order of the buckets, which the members of a group have alike; between steps."""
        for bucket in self.buckets:
            lent = bucket.group.lend(bucket.gradients.numel(), bucket.gradients.dtype) if bucket.partitioned else None
            if lent is not None:
                bucket.gradients, bucket.lent = lent, True
        places = ((entry, bucket) for bucket in self.buckets for entry in bucket.entries)
        for sink, (entry, bucket) in zip(self._sinks, places, strict=True):
            sink.view = _gradient_of(entry, bucket)

    def begin(self, micro_batches: int) -> None:
        """Before the first backward of a step whose parameters each see `micro_batches` backward passes."""
        for sink in self._sinks:
            sink.fresh = True
        self._begun = 0
        for bucket in self.buckets:
            bucket.pending = sum(entry.uses for entry in bucket.entries) * micro_batches

    def finish(self) -> None:
        """After the last backward: when it returns, every bucket's shard_gradients hold the reduced gradient."""
        for sink in self._sinks:
            if sink.fresh:  # its parameter took no part in this step's loss
                sink.view.zero_()
        for bucket in self._at_once[self._begun :]:
            self._reduce(bucket)
        for bucket in self.buckets:
            if _waits_for_all(bucket):
                self._reduce(bucket)
        for bucket in self.buckets:
            for work in bucket.work:
                work.wait()
            bucket.work.clear()
        for group in {id(bucket.group): bucket.group for bucket in self.buckets if bucket.lent}.values():
            group.barrier()  # the gradients may be written again

    @contextmanager
    def putting_off(self) -> Iterator[list[Callable[[], None]]]:
        """Inside, gradients of weights that go through a sink are not computed; the list gets what does it, to be called later."""
        self.put_off = []
        try:
            yield self.put_off
        finally:
            self.put_off = None

    def count(self, bucket: Bucket) -> None:
        """One parameter's gradient of one micro-batch is in. Reductions begin in the order of the buckets, whichever is complete
        first: ranks with another number of micro-batches complete them in another order."""
        bucket.pending -= 1
        while self._begun < len(self._at_once) and self._at_once[self._begun].pending == 0:
            self._begun += 1
            self._reduce(self._at_once[self._begun - 1])

    def close(self) -> None:
        """Let the parameters go: they refer to the buckets, and those to them, by way of hooks that Python's collector cannot see
        through."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        for bucket in self.buckets:
            for entry in bucket.entries:
                if gradient_sink(entry.parameter) is not None:
                    del entry.parameter.gradient_sink  # type: ignore[attr-defined]

    def _reduce(self, bucket: Bucket) -> None:
        self.mesh.monitor.at("bucket")
        if self.before_reduction is not None:
            self.before_reduction(bucket)
        if bucket.kind.tied:
            self.mesh.group("ends").all_reduce(bucket.gradients)
        if bucket.kind.partial_over:
            self.mesh.group(bucket.kind.partial_over).all_reduce(bucket.gradients)
        if bucket.partitioned:
            bucket.work.append(bucket.group.reduce_scatter(bucket.shard_gradients, bucket.gradients, asynchronous=True))
        elif bucket.group.size > 1:
            bucket.work.append(bucket.group.all_reduce(bucket.gradients, asynchronous=True))


def _gradient_of(entry: Entry, bucket: Bucket) -> torch.Tensor:
    return bucket.gradients[entry.start : entry.start + entry.parameter.numel()].view_as(entry.parameter)


@dataclass
class GradientSink:
    """Where one parameter's gradient goes: its place in the bucket, `view`, in the parameter's shape."""

    reducer: GradientReducer
    bucket: Bucket
    view: torch.Tensor
    fresh: bool = False
    """Whether nothing of this step is in it yet."""

    def take(self, parameter: torch.Tensor) -> None:
        """The parameter's hook: move what autograd has accumulated; nothing where the other methods have taken it."""
        if parameter.grad is None:
            return
        self.add(parameter.grad)
        parameter.grad = None

    def add_products(self, lefts: Sequence[torch.Tensor], rights: Sequence[torch.Tensor]) -> None:
        """Add the gradient of a matrix, left @ right, or of each of the matrices [E, O, I] in turn; no copy, nothing rounded."""
        self._now_or_later(partial(self._add_products, lefts, rights))

    def add_rows(self, rows: torch.Tensor, indices: torch.Tensor) -> None:
        """Add rows [N, H] to those that `indices` [N] names of a matrix [V, H]."""
        self._now_or_later(partial(self._add_rows, rows, indices))

    def add_computed(self, compute: Callable[[], torch.Tensor]) -> None:
        """Add the gradient that `compute` gives, in the parameter's shape."""
        self._now_or_later(lambda: self._add(compute()))

    def add(self, gradient: torch.Tensor, factor: torch.Tensor | None = None) -> None:
        """Add a gradient that is there already, in the parameter's shape, times a scalar; never put off."""
        if factor is None:
            self._add(gradient)
        elif self.fresh:
            self.view.copy_(gradient).mul_(factor)
        else:
            self.view.addcmul_(gradient, factor)
        self._counted()

    def _add(self, gradient: torch.Tensor) -> None:
        self.view.copy_(gradient) if self.fresh else self.view.add_(gradient)

    def _now_or_later(self, work: Callable[[], None]) -> None:
        def do() -> None:
            work()
            self._counted()

        if self.reducer.put_off is None:
            do()
        else:
            self.reducer.put_off.append(do)

    def _add_products(self, lefts: Sequence[torch.Tensor], rights: Sequence[torch.Tensor]) -> None:
        views = self.view.unsqueeze(0) if self.view.ndim == 2 else self.view
        for view, left, right in zip(views, lefts, rights, strict=True):
            if left.dtype == view.dtype:
                torch.addmm(view, left, right, beta=0 if self.fresh else 1, out=view)
            elif on_nvidia(view):  # whose matrix product gives its sums away before they are rounded
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
    """Where the gradient of `parameter` is to go; None: to autograd."""
    return getattr(parameter, "gradient_sink", None)


def _waits_for_all(bucket: Bucket) -> bool:
    """Buckets whose reduction crosses a second group go last, in the same order on every rank, so that no two ranks wait
    for each other in different groups."""
    return bucket.kind.tied or bucket.kind.partial_over is not None


def gather_weights(buckets: list[Bucket]) -> None:
    """After the update of the shards: every rank's working weights are whole again."""
    works = []
    for bucket in buckets:
        if bucket.partitioned:
            works.append(bucket.group.all_gather(bucket.weights, bucket.shard_weights, asynchronous=True))
    for work in works:
        work.wait()

"""Adds gradients to buckets and reduces the buckets over the data ranks, most of them during the backward pass."""

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from statistics import median_high

import torch
from torch.utils.hooks import RemovableHandle

from bagualu.comm.backend import Work
from bagualu.comm.monitor import Phase
from bagualu.parallel.data.bucket import Bucket, Entry, crosses_two_groups
from bagualu.parallel.mesh import Mesh
from bagualu.parallel.products import Products

_MOST_IN_FLIGHT = 2
"""The number of reductions under ZeRO-2 that may be in progress at the same time."""


class GradientReducer:
    """Adds the gradients of a step's micro-batches to the buckets, and reduces the buckets: most during the backward pass, once
    they and all earlier ones are complete."""

    def __init__(self, buckets: list[Bucket], mesh: Mesh) -> None:
        self.buckets = buckets
        self.mesh = mesh
        self.put_off: list[Callable[[], None]] | None = None
        """Functions that compute the weight gradients deferred so far; None outside `putting_off`, where no gradient is
        deferred."""
        self.before_reduction: Callable[[torch.Tensor], None] | None = None
        """Called with each bucket's gradients when this rank's are complete and before other ranks' are added; None: no call."""
        self._handles: list[RemovableHandle] = []
        self._reduced_early = [bucket for bucket in buckets if bucket.reduced is None and not crosses_two_groups(bucket.kind)]
        """The buckets whose reduction starts during the backward pass, in order: each as soon as it and all earlier ones are
        complete."""
        self._begun = 0
        """How many buckets of `_reduced_early` have begun their reduction in this step's backward passes."""
        self._sharded = [bucket for bucket in buckets if bucket.reduced is not None]
        self._in_flight: deque[tuple[Bucket, Work, torch.Tensor]] = deque()
        """Reductions of `_sharded` in progress, oldest first: (bucket, work, its result, a part of the gradients that it reads)."""
        self._most_held = _most_held([_gradient_bytes(bucket) for bucket in self._sharded])
        self._sinks_of: dict[int, list[tuple[Entry, GradientSink]]] = {}
        """The sinks of each bucket, by the bucket's id."""
        for bucket in buckets:
            for entry in bucket.entries:
                sink = GradientSink(self, bucket, _gradient_of(entry, bucket))
                self._sinks_of.setdefault(id(bucket), []).append((entry, sink))
                self._handles.append(entry.parameter.register_post_accumulate_grad_hook(sink.take))
                entry.parameter.gradient_sink = sink  # type: ignore[attr-defined]

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
            for entry, sink in self._sinks_of[id(bucket)]:
                sink.view = _gradient_of(entry, bucket)

    def begin(self, micro_batches: int) -> None:
        """Prepares for a step with `micro_batches` backward passes for each parameter. Call it before the first forward pass.

        If there is one backward pass, gradients of the step before are freed where no other rank reads them, so that activations
        can take their memory until the backward pass needs it again."""
        for sink in self._sinks():
            sink.fresh = True
        self._begun = 0
        for bucket in self.buckets:
            bucket.pending = sum(entry.uses for entry in bucket.entries)
            if bucket.reduced is None:
                bucket.pending *= micro_batches
                if micro_batches == 1 and not bucket.partitioned:
                    self._free(bucket)
            else:
                bucket.reductions = micro_batches
                bucket.reduced.zero_()

    def finish(self) -> None:
        """Finishes all reductions; call it after the last backward pass. Then `shard_gradients` of every bucket is the gradient
        summed over micro-batches and ranks."""
        for bucket in self.buckets:
            if bucket.reduced is None:
                self.prepare(bucket)
        for sink in self._sinks():
            if sink.fresh:  # its parameter took no part in this step's loss
                sink.view.zero_()
        for bucket in self._reduced_early[self._begun :]:
            self._reduce(bucket)
        for bucket in self._sharded:
            while bucket.reductions:
                self._reduce_part(bucket)
        self.settle()
        for bucket in self.buckets:
            if crosses_two_groups(bucket.kind):
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

    def _sinks(self) -> Iterator["GradientSink"]:
        return (sink for sinks in self._sinks_of.values() for _, sink in sinks)

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
        if bucket.gradients.numel():
            return
        if bucket.reduced is not None:
            while self._in_flight and self._held_in_flight() + _gradient_bytes(bucket) > self._most_held:
                self._add_oldest()
        bucket.gradients = bucket.gradients.new_empty(bucket.weights.numel())
        last = bucket.entries[-1]
        bucket.gradients[last.start + last.parameter.numel() :].zero_()  # padding
        for entry, sink in self._sinks_of[id(bucket)]:
            sink.view, sink.fresh = _gradient_of(entry, bucket), True

    def _free(self, bucket: Bucket) -> None:
        """Frees the gradients of a bucket."""
        bucket.gradients = bucket.gradients.new_empty(0)
        for _, sink in self._sinks_of[id(bucket)]:
            sink.view = bucket.gradients

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
        result = bucket.gradients[bucket.shard]
        work = bucket.group.reduce_scatter(result, bucket.gradients, asynchronous=True)
        self._in_flight.append((bucket, work, result))
        bucket.gradients = bucket.reduced[:0]
        bucket.reductions -= 1
        bucket.pending = sum(entry.uses for entry in bucket.entries)

    def settle(self) -> None:
        """Waits for the reductions of ZeRO-2 and 3 in progress, and frees their gradients."""
        while self._in_flight:
            self._add_oldest()

    def _held_in_flight(self) -> int:
        return sum(_gradient_bytes(bucket) for bucket, *_ in self._in_flight)

    def _add_oldest(self) -> None:
        bucket, work, result = self._in_flight.popleft()
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


def _gradient_bytes(bucket: Bucket) -> int:
    """Returns the bytes of the gradients of a whole bucket under ZeRO-2 and 3."""
    return 0 if bucket.reduced is None else bucket.weights.numel() * bucket.reduced.itemsize


def _most_held(sizes: list[int]) -> int:
    """Returns the most bytes of gradients that reductions in progress and a bucket that begins may hold together, given those of
    the buckets: as many as the largest bucket and two usual ones. So the matrix of a large vocabulary does not wait in memory for
    its reduction while another large bucket begins."""
    return max(sizes, default=0) + _MOST_IN_FLIGHT * (median_high(sizes) if sizes else 0)


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

    def add_products(self, products: Products, columns: Sequence[torch.Tensor], rows: Sequence[torch.Tensor]) -> None:
        """Adds columns.T @ rows, the gradient of a matrix [O, I], given columns [N, O] and rows [N, I]; for E matrices [E, O, I],
        adds a product to each."""
        self._run_or_defer(partial(self._add_products, products, columns, rows))

    def add_rows(self, rows: torch.Tensor, indices: torch.Tensor) -> None:
        """Adds rows [N, H] to the rows `indices` [N] of the gradient of a matrix [V, H]."""
        self._run_or_defer(partial(self._add_rows, rows, indices))

    def add_computed(self, compute: Callable[[], torch.Tensor]) -> None:
        """Adds the gradient, in the parameter's shape, that `compute` returns."""
        self._run_or_defer(lambda: self._add(compute()))

    def settle(self) -> None:
        """Call before much memory is needed: frees gradients that are being reduced, as soon as they are."""
        self.reducer.settle()

    def add(self, gradient: torch.Tensor, factor: torch.Tensor | None = None) -> None:
        """Adds an existing gradient, in the parameter's shape, times an optional scalar. This is never deferred."""
        self.reducer.prepare(self.bucket)
        if factor is None:
            self._add(gradient)
        elif self.fresh:
            torch.mul(gradient, factor, out=self.view)
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

    def _add_products(self, products: Products, columns: Sequence[torch.Tensor], rows: Sequence[torch.Tensor]) -> None:
        views = self.view.unsqueeze(0) if self.view.ndim == 2 else self.view
        for view, of_outputs, of_inputs in zip(views, columns, rows, strict=True):
            products.add_weight_gradient(view, of_outputs, of_inputs, self.fresh)

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

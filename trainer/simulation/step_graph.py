"""The graph (torch.fx) of what a rank executes in a training step: its operators, and whose results each of them reads."""

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, fx
from torch.utils._python_dispatch import TorchDispatchMode

from bagualu.parallel.simulation.events import Operator
from bagualu.trainer.operators.kernel import Kernel
from bagualu.trainer.simulation.operators import Operators, bytes_of, computes, read_and_written, tensors_in

CALL = "call"
"""The key of a node's `meta` with its `OperatorCall`; placeholders have none."""


@dataclass(frozen=True)
class StoragePart:
    """The part of a storage that an operator reads or writes."""

    made_by: fx.Node
    """Of what is read, the node that wrote it last; of what is written, the first that wrote to the storage. A placeholder, if the
    storage is older than the step."""
    begin: int
    """Where it begins in the storage, in bytes."""
    bytes: int


@dataclass(frozen=True)
class OperatorCall:
    """What a node stands for."""

    operator: Operator
    reads: tuple[StoragePart, ...]
    writes: tuple[StoragePart, ...]
    loop: torch.Size
    """The shape of the operator's largest tensor."""
    kernel: str | None
    """The generated kernel of which the operator is a part."""
    place: Hashable
    """Which call of that kernel; without a kernel, the part of the step between communications. Only operators with the same place
    can be one kernel."""
    ends_loop: bool
    """Whether the result is complete only after the whole loop, as a sum over rows is."""


class Around(Protocol):
    """What operators ask the dispatch mode around them (parallel/precision.py)."""

    chip: str


class StepGraph(TorchDispatchMode):
    """Within this context, adds each operator of the thread to `graph`.

    The arguments of a node are the nodes that wrote what it reads, found by the memory of tensors: a view is a part of what it is a
    view of. What no operator has written is of a placeholder. The function of a generated kernel is in the graph operator by
    operator.
    """

    def __init__(self, around: Around, place: Callable[[], Hashable]) -> None:
        """`around`: the mode around this one, for which it stands. `place` returns which part of the
        step runs, of those that communications divide."""
        super().__init__()
        self.graph = fx.Graph()
        self.chip, self._place = around.chip, place
        self._operators = Operators()
        self._storages: dict[int, _Storage] = {}
        """By address. A storage is kept, so that no other gets its address."""
        self._kernel: str | None = None
        self._calls = 0

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        named = kwargs or {}
        given = [*tensors_in(args), *tensors_in(named.values())]
        result = func(*args, **named)
        made = list(tensors_in((result,)))
        older = {tensor.untyped_storage()._cdata for tensor in given}
        for tensor in made:
            if tensor.untyped_storage()._cdata not in older:
                self._storage(tensor, is_new=True)
        if computes(func) and any(tensor.is_meta for tensor in (made or given)):
            reads, writes = read_and_written(func, args, named)
            operator = self._operators.of(func, args, named, result, given, made)
            self._add(func, operator, reads, writes or made, _ends_loop(func, args, named))
        return result

    def as_one_kernel(self, kernel: Kernel, given: Sequence[Any]) -> Any:
        """Returns what `kernel` does, computed by its function."""
        self._kernel, self._calls = kernel.name, self._calls + 1
        try:
            return kernel.function(*given)
        finally:
            self._kernel = None

    def _add(self, func: Any, operator: Operator, reads: Sequence[Tensor], writes: Sequence[Tensor], ends_loop: bool) -> None:
        parts = [part for tensor in reads for part in self._storage(tensor).read(tensor)]
        node = self.graph.call_function(func, tuple(dict.fromkeys(part.made_by for part in parts)))
        node.meta[CALL] = OperatorCall(
            operator=operator,
            reads=tuple(parts),
            writes=tuple(self._storage(tensor).written(tensor, node) for tensor in writes),
            loop=max((tensor.shape for tensor in (*reads, *writes)), key=torch.Size.numel),
            kernel=self._kernel,
            place=self._place() if self._kernel is None else self._calls,
            ends_loop=ends_loop,
        )

    def _storage(self, tensor: Tensor, is_new: bool = False) -> "_Storage":
        storage = tensor.untyped_storage()
        if (known := self._storages.get(storage._cdata)) is None:
            known = self._storages[storage._cdata] = _Storage(storage, None if is_new else self._placeholder())
        return known

    def _placeholder(self) -> fx.Node:
        with self.graph.inserting_before(next(iter(self.graph.nodes), None)):
            return self.graph.placeholder("given")

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """Returns that torch need not import its compiler to keep it from compiling this class."""
        return False


class _Storage:
    """Who wrote what of a storage."""

    def __init__(self, storage: torch.UntypedStorage, older: fx.Node | None) -> None:
        """`older`: a placeholder, if the storage is older than the step."""
        self._kept, self._first = storage, older
        self._writers: list[tuple[int, int, fx.Node]] = [] if older is None else [(0, storage.nbytes(), older)]
        """Where what is written begins and ends, in bytes, and its node: the last one last."""

    def read(self, tensor: Tensor) -> list[StoragePart]:
        """Returns the parts of `tensor`, by their writers."""
        begin, end = _extent(tensor)
        left = bytes_of(tensor)
        parts = []
        for low, high, node in reversed(self._writers):
            common = min(end, high) - max(begin, low)
            if common > 0 and left > 0:
                size = min(left, round(bytes_of(tensor) * common / (end - begin)))
                parts.append(StoragePart(node, max(begin, low), size))
                left -= size
        return parts

    def written(self, tensor: Tensor, node: fx.Node) -> StoragePart:
        """Notes that `node` writes to `tensor`; returns what it writes."""
        begin, end = _extent(tensor)
        self._first = self._first or node
        self._writers.append((begin, end, node))
        return StoragePart(self._first, begin, bytes_of(tensor))


def _extent(tensor: Tensor) -> tuple[int, int]:
    """Returns where a tensor begins in its storage, and where it ends, in bytes."""
    begin = int(tensor.storage_offset())
    steps = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return begin * tensor.itemsize, (begin + (1 + steps if tensor.numel() else 0)) * tensor.itemsize


def _ends_loop(func: Any, args: Sequence[Any], named: Mapping[str, Any]) -> bool:
    """Returns whether an operator adds up other elements than those of rows."""
    if torch.Tag.reduction not in func.tags or not isinstance(args[0], Tensor):
        return False
    given = dict(zip((one.name for one in func._schema.arguments), args, strict=False)) | dict(named)
    dims = given.get("dim")
    dims = [dims] if isinstance(dims, int) else dims
    return not dims or {dim % max(1, args[0].dim()) for dim in dims} != {args[0].dim() - 1}

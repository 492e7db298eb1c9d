"""The graph (torch.fx) of what a rank executes in a training step: its operators, and whose results each of them reads."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils._python_dispatch import TorchDispatchMode

from bagualu.parallel.simulation.events import Operator
from bagualu.trainer.operators.kernel import Kernel
from bagualu.trainer.simulation.operators import Operators, bytes_of, computes, read_and_written, tensors_in

OPERATOR, READS, KERNEL, PLACE, LOOP = "operator", "reads", "kernel", "place", "loop"
"""Keys of a node's `meta`: its `Operator`; the bytes that it reads of each of its arguments; the name of the generated kernel that
has it, or None; which call of that kernel, or else which section of the step; and over which shape it loops, that of its largest
tensor."""


class StepGraph(TorchDispatchMode):
    """Within this context, adds each operator of the thread to `graph`.

    The arguments of a node are those nodes whose results it reads, found by memory: a view is what it is a view of, and whoever
    wrote last to a tensor made it. Tensors that no operator has made yet are placeholders. The function of a generated kernel is
    in the graph operator by operator.
    """

    def __init__(self, chip: str, linear_products: Callable[[], AbstractContextManager[Any]], section: Callable[[], int]) -> None:
        """`chip` and `linear_products`: those of the mode around this one, for which it stands. `section` returns the number of the
        part of the step that runs."""
        super().__init__()
        self.graph = fx.Graph()
        self.chip, self.linear_products, self._section = chip, linear_products, section
        self._operators = Operators()
        self._made: dict[int, tuple[torch.UntypedStorage, fx.Node]] = {}
        """By the address of a storage, which is kept so that no other gets its address: the node that wrote to it last."""
        self._kernel: str | None = None
        self._calls = 0

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        named = kwargs or {}
        given = [*tensors_in(args), *tensors_in(named.values())]
        result = func(*args, **named)
        made = list(tensors_in((result,)))
        if computes(func) and any(tensor.is_meta for tensor in (made or given)):
            reads, writes = read_and_written(func, args, named)
            self._add(func, self._operators.of(func, args, named, result, given, made), reads, writes or made)
        return result

    def as_one_kernel(self, kernel: Kernel, given: Sequence[Any]) -> Any:
        """Returns what `kernel` does, computed by its function."""
        self._kernel, self._calls = kernel.name, self._calls + 1
        try:
            return kernel.function(*given)
        finally:
            self._kernel = None

    def _add(self, func: Any, operator: Operator, reads: Sequence[Tensor], writes: Sequence[Tensor]) -> None:
        node = self.graph.call_function(func, tuple(map(self._node_of, reads)))
        place = self._section() if self._kernel is None else self._calls
        loop = max((tensor.shape for tensor in (*reads, *writes)), key=torch.Size.numel)
        node.meta = {OPERATOR: operator, READS: list(map(bytes_of, reads)), KERNEL: self._kernel, PLACE: place, LOOP: loop}
        for tensor in writes:
            storage = tensor.untyped_storage()
            self._made[storage._cdata] = storage, node

    def _node_of(self, tensor: Tensor) -> fx.Node:
        storage = tensor.untyped_storage()
        if (known := self._made.get(storage._cdata)) is None:
            first = next(iter(self.graph.nodes), None)
            with self.graph.inserting_before(first):
                known = self._made[storage._cdata] = storage, self.graph.placeholder(f"given{len(self._made)}")
        return known[1]

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """Returns that torch need not import its compiler to keep it from compiling this class."""
        return False

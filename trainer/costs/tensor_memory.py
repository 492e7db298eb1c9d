"""Counts the bytes of the tensors that a rank holds, by storage: views and aliases of a tensor count once.

torch has an allocator with counts on accelerators only. On a CPU, `TensorMemory` sees the result of every operation that its thread
runs, forward passes, the insides of autograd functions, backward passes and updates alike, and is told when a storage is freed.
Working memory inside a kernel is no tensor and does not count. Memory of another rank that this rank maps does not count, because
an operation that gives a view of what exists, or writes to it, makes no new storage.
"""

import weakref
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from bagualu.trainer.operators.kernel import Kernel


class TensorMemory(TorchDispatchMode):
    """Within this context, counts the tensors that the thread makes; `hold` adds tensors that were there before."""

    def __init__(self) -> None:
        super().__init__()
        self.peak = 0
        """The most bytes that were held at once, so far."""
        self._bytes = 0
        self._held: dict[int, tuple[weakref.ref[torch.UntypedStorage], int]] = {}
        """By the id of a storage: a reference that does not keep it alive, and its bytes when they were last read."""
        self._resizable: set[int] = set()
        """The ids of storages that were empty when they were given to `hold`: those of gathered weights, which engines resize
        without an operation that would show it."""
        self._freed: deque[int] = deque()
        """The bytes of freed storages that are still part of `_bytes`. Any thread may free a storage, this thread counts."""

    def __enter__(self) -> "TensorMemory":
        super().__enter__()
        return self

    def hold(self, tensors: Iterable[torch.Tensor]) -> None:
        """Counts tensors that this rank holds already. Of these, empty ones alone may be resized later by their storage."""
        for tensor in tensors:
            storage = tensor.untyped_storage()
            self._count(storage)
            if not storage.nbytes():
                self._resizable.add(id(storage))

    @property
    def bytes(self) -> int:
        """The bytes that are held now."""
        while self._freed:
            self._bytes -= self._freed.popleft()
        return self._bytes

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Sequence[type], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if any(hasattr(kind, "__tensor_flatten__") for kind in types):
            return NotImplemented  # a tensor made of tensors, such as DTensor, which then runs operations on these
        named = kwargs or {}
        result = func(*args, **named)
        for tensor in result if isinstance(result, tuple | list) else (result,):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                if id(storage) in self._held or not (_among(storage, args) or _among(storage, named.values())):
                    self._count(storage)
        return result

    def as_one_kernel(self, kernel: Kernel, given: Sequence[Any]) -> Any:
        """Returns what a generated kernel does, and counts its results, but not arguments that it changes. It must run as it does
        outside of this context."""
        with _disable_current_modes():
            result = kernel(*given)
        for tensor in result if isinstance(result, tuple) else (result,):
            storage = tensor.untyped_storage()
            if id(storage) in self._held or not _among(storage, given):
                self._count(storage)
        return result

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """Returns that torch need not import its compiler, which takes two seconds, to keep it from compiling this class."""
        return False

    def _count(self, storage: torch.UntypedStorage) -> None:
        """Counts a storage with its present size, whether it is new or the operation has resized it."""
        if storage.device.type == "meta":  # of a tensor without values
            return
        if id(storage) not in self._held:
            self._add(storage)
        elif not self._changed(storage):
            return
        for key in tuple(self._resizable):
            reference, _ = self._held.get(key, (None, 0))
            if reference is not None and (resizable := reference()) is not None:
                self._changed(resizable)
        self.peak = max(self.peak, self.bytes)

    def _add(self, storage: torch.UntypedStorage) -> None:
        key = id(storage)  # the same for all tensors of the storage, as long as it exists

        def forget(_: Any) -> None:
            self._freed.append(self._held.pop(key)[1])
            self._resizable.discard(key)

        self._held[key] = weakref.ref(storage, forget), storage.nbytes()
        self._bytes += self._held[key][1]

    def _changed(self, storage: torch.UntypedStorage) -> bool:
        """Reads the size of a counted storage, and returns whether it has changed."""
        reference, before = self._held[id(storage)]
        now = storage.nbytes()
        self._held[id(storage)] = reference, now
        self._bytes += now - before
        return now != before


def _among(storage: torch.UntypedStorage, arguments: Iterable[Any]) -> bool:
    """Returns whether a tensor of `arguments`, or of a list in them, has this storage."""
    for argument in arguments:
        if isinstance(argument, torch.Tensor):
            if argument.untyped_storage() is storage:
                return True
        elif isinstance(argument, tuple | list) and _among(storage, argument):
            return True
    return False

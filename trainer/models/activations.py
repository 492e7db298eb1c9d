"""What happens to activations between the forward and the backward pass: they are computed again, or kept in host memory."""

import weakref
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.utils.checkpoint import checkpoint

_LEAST_BYTES = 2**8
"""Smaller storages stay on the device: to copy them takes longer than they are worth."""


def run(function: Callable[[torch.Tensor], Any], x: torch.Tensor, again: bool) -> Any:
    """Returns function(x). With `again`, only x is kept for the backward pass, which calls `function` a second time, with gradients
    enabled. So `function` must have no effect but its result, and communicate in the same way on all ranks."""
    if again and torch.is_grad_enabled():
        return checkpoint(function, x, use_reentrant=False, preserve_rng_state=False)
    return function(x)


class HostMemory:
    """Keeps activations in host memory instead of device memory, at most `limit_bytes` at a time.

    While there is room, all activations of decoder layers go to the host in the order in which they are saved. So those of the
    earliest layers go there, which the backward pass needs last. While a layer computes, the activations of the layer before it
    are copied, and then freed on the device. In the backward pass, while a layer computes, those of the layer that comes next are
    copied back. On a CUDA device, copies run on a stream of their own, from and to pinned memory.

    Every storage is copied once, however many tensors share it. Weights, and what other objects hold anyway, stay where they are.
    """

    def __init__(self, limit_bytes: int) -> None:
        self.limit_bytes = limit_bytes
        self.bytes = 0
        """Bytes of activations in host memory at present."""
        self._leaving: _LayerPass | None = None
        """The latest layer, whose activations are being copied and are still on the device."""
        self._known: weakref.WeakValueDictionary[int, _Storage] = weakref.WeakValueDictionary()
        """The storages that were saved and are still on the device, by their address there."""
        self._stream: torch.cuda.Stream | None = None

    def begin_pass(self) -> Callable[[], AbstractContextManager[None]]:
        """Returns a function for a forward pass. Called for each of the layers in order, it returns the context to run the layer
        in."""
        if not self.limit_bytes or not torch.is_grad_enabled():
            return nullcontext
        before: _LayerPass | None = None

        @contextmanager
        def saving() -> Iterator[None]:
            nonlocal before
            here = _LayerPass(self, before)
            with torch.autograd.graph.saved_tensors_hooks(here.pack, here.unpack):
                yield
            self.free(here)
            before = here

        return saving

    def take(self, tensor: torch.Tensor) -> "_Storage | None":
        """Returns the storage of `tensor`, of which a copy to the host has begun; None if there is no room for it."""
        storage = tensor.untyped_storage()
        found = self._known.get(storage.data_ptr())
        if found is None and _LEAST_BYTES <= storage.nbytes() <= self.limit_bytes - self.bytes:
            device = _bytes_of(storage)
            host = torch.empty(storage.nbytes(), dtype=torch.uint8, pin_memory=tensor.is_cuda)
            found = self._known[storage.data_ptr()] = _Storage(self, device, host, self.copy(host, device))
            self.bytes += storage.nbytes()
        return found

    def free(self, here: "_LayerPass") -> None:
        """Frees the activations of the latest layer on the device, unless that is the layer `here`, which is the latest from now
        on."""
        if self._leaving is not None and self._leaving is not here:
            self._leaving.free()
        self._leaving = here

    def forget(self, address: int) -> None:
        """Call when the storage at `address` is no longer on the device."""
        del self._known[address]

    def copy(self, to: torch.Tensor, source: torch.Tensor) -> torch.cuda.Event | None:
        """Copies `source` to `to`. On a CUDA device, does so after all work that the current stream has been given, but does not
        wait; returns the event of the copy's end."""
        device = to if to.is_cuda else source
        if not device.is_cuda:
            to.copy_(source)
            return None
        self._stream = self._stream or torch.cuda.Stream(device.device)
        self._stream.wait_stream(torch.cuda.current_stream(device.device))
        with torch.cuda.stream(self._stream):
            to.copy_(source, non_blocking=True)
            done = torch.cuda.Event()
            done.record()
        return done


@dataclass(eq=False)
class _Storage:
    """The bytes of a storage [n], on the device, on the host, or on both while they are copied."""

    memory: HostMemory
    device: torch.Tensor | None
    host: torch.Tensor | None
    copied: torch.cuda.Event | None
    """The end of the latest copy. The stream that uses its result, or the memory that it read or wrote, must wait for it."""
    home: torch.device = field(init=False)

    def __post_init__(self) -> None:
        assert self.device is not None
        self.home = self.device.device

    def free(self) -> None:
        """Frees the bytes on the device, which have a copy on the host. If another object keeps them there, frees the copy."""
        if self.device is None or self.host is None:
            return
        self.wait()
        address, storage = self.device.data_ptr(), weakref.ref(self.device.untyped_storage())
        self.device = None
        if (kept := storage()) is None:
            self.memory.forget(address)
        else:
            self.device = _bytes_of(kept)
            self._leave_host()

    def fetch(self) -> None:
        """Copies the bytes to the device if they are not there."""
        if self.device is None:
            assert self.host is not None
            self.device = torch.empty(self.host.numel(), dtype=torch.uint8, device=self.home)
            self.copied = self.memory.copy(self.device, self.host)
        if self.host is not None:
            self._leave_host()

    def wait(self) -> None:
        """Makes the current stream wait for the latest copy."""
        if self.copied is not None:
            torch.cuda.current_stream(self.home).wait_event(self.copied)
            self.copied = None

    def _leave_host(self) -> None:
        assert self.host is not None
        self.memory.bytes -= self.host.numel()
        self.host = None

    def __del__(self) -> None:
        self.wait()
        if self.host is not None:
            self._leave_host()


def _bytes_of(storage: torch.UntypedStorage) -> torch.Tensor:
    """Returns all bytes of `storage` as a tensor [n]."""
    return torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)


@dataclass(frozen=True)
class _Saved:
    """A tensor as autograd saves it: a view of a storage, with dtype, shape and strides."""

    storage: _Storage
    dtype: torch.dtype
    shape: torch.Size
    stride: tuple[int, ...]
    offset: int


@dataclass(eq=False)
class _LayerPass:
    """The activations that a layer saves in one forward pass."""

    memory: HostMemory
    before: "_LayerPass | None"
    """The layer before it in the same forward pass, whose backward pass comes next."""
    storages: list[weakref.ref[_Storage]] = field(default_factory=list)

    def pack(self, tensor: torch.Tensor) -> _Saved | torch.Tensor:
        storage = self.memory.take(tensor) if _is_activation(tensor) else None
        if storage is None:
            return tensor.detach()
        self.storages.append(weakref.ref(storage))
        return _Saved(storage, tensor.dtype, tensor.shape, tensor.stride(), int(tensor.storage_offset()))

    def unpack(self, saved: _Saved | torch.Tensor) -> torch.Tensor:
        self.memory.free(self)
        if self.before is not None:
            self.before.fetch()
            self.before = None
        if isinstance(saved, torch.Tensor):
            return saved
        saved.storage.fetch()
        saved.storage.wait()
        assert saved.storage.device is not None
        view = torch.empty(0, dtype=saved.dtype, device=saved.storage.device.device)
        return view.set_(saved.storage.device.untyped_storage(), saved.offset, saved.shape, saved.stride)

    def free(self) -> None:
        for storage in self._living():
            storage.free()

    def fetch(self) -> None:
        for storage in self._living():
            storage.fetch()

    def _living(self) -> list[_Storage]:
        return [storage for reference in self.storages if (storage := reference()) is not None]


def _is_activation(tensor: torch.Tensor) -> bool:
    """Returns whether `tensor` is an activation: no weight, no view of a weight, and not the input of a stage, which the pipeline
    holds."""
    whole = tensor if tensor._base is None else tensor._base
    return type(whole) is torch.Tensor and whole.layout is torch.strided and not (whole.is_leaf and whole.requires_grad)

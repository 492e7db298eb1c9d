"""The form of a kernel's arguments: all that the code generated for them depends on.

A form describes tensors of fixed sizes or, for a kernel that takes all sizes, of sizes that vary: those of leading dimensions, if
they are not 0 or 1. The last dimension is fixed, since a loop over it is then cut into whole vectors. Varying sizes that are equal
have the same name, so that no call takes a kernel made for sizes that were equal, or were different, by chance.
"""

import itertools
from collections.abc import Callable, Sequence, Set
from dataclasses import dataclass
from typing import Any

import torch

NEXT = "next"
"""A stride that is the stride of the next dimension times its size. Other strides are fixed."""
_LARGE = 2**16, 2**31
"""From how many elements on code is of another kind: for several threads, and with indices of 64 bits on a GPU."""
_LEAST_OF_A_THREAD = 512
"""The elements that a thread gets at least (torch._inductor.config.cpp.min_chunk_size)."""


@dataclass(frozen=True)
class TensorForm:
    """A tensor's form. Names stand for varying sizes."""

    dtype: torch.dtype
    device: torch.device
    sizes: tuple[int | str, ...]
    strides: tuple[int | str, ...]

    def empty(self, size_of: Callable[[str], Any]) -> torch.Tensor:
        """Returns a tensor of this form without values, with the sizes that `size_of` has for names."""
        sizes = [size_of(size) if isinstance(size, str) else size for size in self.sizes]
        strides: list[Any] = []
        for dim in reversed(range(len(sizes))):
            strides.insert(0, strides[0] * sizes[dim + 1] if self.strides[dim] == NEXT else self.strides[dim])
        return torch.empty_strided(sizes, strides, dtype=self.dtype, device=self.device)


@dataclass(frozen=True)
class Form:
    """The forms of tensors, and the other arguments themselves with the names of their types and their text."""

    arguments: tuple[TensorForm | tuple[str, Any, str], ...]
    magnitude: tuple[int, ...] = ()
    """Where sizes vary: how many of the limits from which code is of another kind the largest tensor reaches, and the sizes, up to
    twice the number of threads. By these the code's loops are divided among threads."""

    def given(self, tensors: Sequence[torch.Tensor]) -> list[Any]:
        """Returns all arguments, with `tensors` in the places of tensors."""
        left = iter(tensors)
        return [next(left) if isinstance(one, TensorForm) else one[1] for one in self.arguments]

    def sizes_in(self, given: Sequence[Any]) -> dict[str, int]:
        """Returns the varying sizes in arguments of this form."""
        both = [(one, value) for one, value in zip(self.arguments, given, strict=True) if isinstance(one, TensorForm)]
        return {
            name: size for one, value in both for name, size in zip(one.sizes, value.shape, strict=True) if isinstance(name, str)
        }

    @property
    def tensors(self) -> list[TensorForm]:
        return [one for one in self.arguments if isinstance(one, TensorForm)]


def form_of(given: Sequence[Any], all_sizes: bool) -> Form:
    """Returns the form of tensors and numbers, with sizes that vary if the kernel takes `all_sizes`."""
    tensors = [value for value in given if isinstance(value, torch.Tensor)]
    fixed = {size for tensor in tensors for dim, size in enumerate(tensor.shape) if not all_sizes or not _may_vary(tensor, dim)}
    names: dict[int, str] = {}
    arguments = tuple(
        _tensor_form(value, fixed, names) if isinstance(value, torch.Tensor) else (type(value).__name__, value, repr(value))
        for value in given
    )
    if not names:
        return Form(arguments)
    largest, threads = max(tensor.numel() for tensor in tensors), torch.get_num_threads()
    limits = (*_LARGE, threads * _LEAST_OF_A_THREAD)
    return Form(arguments, (sum(largest >= limit for limit in limits), *(min(size, 2 * threads) for size in names)))


def _may_vary(tensor: torch.Tensor, dim: int) -> bool:
    """Returns whether the size of a dimension may vary: not if a stride depends on it that is taken for fixed."""
    stride = tensor.stride()
    in_order = all(one >= other for one, other in itertools.pairwise(stride))
    return dim + 1 < len(stride) and tensor.size(dim) > 1 and in_order and (dim == 0 or _is_next(tensor, dim - 1))


def _is_next(tensor: torch.Tensor, dim: int) -> bool:
    return dim + 1 < tensor.dim() and tensor.stride(dim) == tensor.stride(dim + 1) * tensor.size(dim + 1)


def _tensor_form(tensor: torch.Tensor, fixed: Set[int], names: dict[int, str]) -> TensorForm:
    """Returns the form of a tensor; all sizes but the `fixed` ones vary. `names` has those of the tensors before it."""
    sizes = tuple(size if size in fixed else names.setdefault(size, f"size{len(names)}") for size in tensor.shape)
    strides = tuple(NEXT if _is_next(tensor, dim) else stride for dim, stride in enumerate(tensor.stride()))
    return TensorForm(tensor.dtype, tensor.device, sizes, strides)

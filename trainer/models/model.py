"""The interface of a rank's part of a model, the same for all families of models."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from bagualu.comm.group import Group


class Model(nn.Module, ABC):
    """One rank's layers; `forward` has the arguments and results of the pipeline's `Slices`."""

    def __init__(self) -> None:
        super().__init__()
        self.call: Callable[..., Any] = _call
        """Calls a module of `units` with its inputs. ZeRO-3 replaces it, to gather the module's weights before."""

    @property
    @abstractmethod
    def units(self) -> Sequence[nn.Module]:
        """The modules that `forward` calls, in order, which together hold all parameters."""

    def reads_weights_again(self, unit: nn.Module) -> bool:
        """Returns whether the backward pass of `unit` reads its weights, as the forward pass does."""
        return True

    @contextmanager
    def counting_loads(self) -> Iterator[dict[int, torch.Tensor]]:
        """Within this context, yields how many tokens each expert [E] of a mixture gets in forward passes without gradients, by the
        number of the layer; nothing for a model without mixtures."""
        yield {}

    def begin_step(self) -> None:
        """Call before the first forward pass of an attempt at a step."""

    def end_step(self, group: Group) -> None:
        """Changes the model's buffers after a step whose update was applied. `group`: the ranks that hold the same layers and
        process different samples. Collective."""


def _call(module: nn.Module, *inputs: Any) -> Any:
    return module(*inputs)

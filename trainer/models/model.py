"""The interface of a rank's part of a model, the same for all families of models."""

from torch import nn

from bagualu.comm.group import Group


class Model(nn.Module):
    """One rank's layers; `forward` has the arguments and results of the pipeline's `Slices`."""

    def begin_step(self) -> None:
        """Call before the first forward pass of an attempt at a step."""

    def end_step(self, group: Group) -> None:
        """Changes the model's buffers after a step whose update was applied. `group`: the ranks that hold the same layers and
        process different samples. Collective."""

"""DeepSpeed's ZeRO for the parameters that one group of ranks divides.

A `Zero` owns an engine of DeepSpeed and knows where that keeps gradients, master weights and working weights. `FlatOptimizer` takes
the place of an optimizer of torch in it.

DeepSpeed's documented accessors (`safe_get_local_grad` and its kin) serve where they return the tensors themselves, in ZeRO-3.
Those for ZeRO-1 and 2, and all with offload, return copies, and none drops what DeepSpeed keeps of an earlier engine. Then this
module uses attributes that DeepSpeed does not document. tests/test_architecture.py lists them; recipe/deepspeed.py accepts only the
version that has them.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.distributed import ProcessGroup

from bagualu.comm.group import Group
from bagualu.parallel.data.bucket import Entry
from bagualu.parallel.precision import accurate_dtype
from bagualu.trainer.engine.deepspeed_library import quiet
from bagualu.trainer.engine.deepspeed_parts import Members, ZeroPart, flat_part, joined, require_layout, sharded_part

Update = Callable[[torch.Tensor], None]
"""Updates one of DeepSpeed's flat partitions of master weights by its gradient, which is its `grad`."""


class FlatOptimizer(torch.optim.Optimizer):
    """The optimizer that DeepSpeed calls in its step. `update` does the work; None: the step changes nothing."""

    def __init__(self, groups: Sequence[Sequence[Entry]]) -> None:
        super().__init__([{"params": [entry.parameter for entry in group]} for group in groups], {"lr": 0.0})
        self.update: Update | None = None

    def step(self, closure: object = None) -> None:  # type: ignore[override]
        if self.update is not None:
            for partition in self.partitions():
                self.update(partition)

    def partitions(self) -> list[torch.Tensor]:
        """Returns this rank's partitions of master weights, one for each group: DeepSpeed has put them in the parameters' place. In
        ZeRO-3 there are some only during a step."""
        return [partition for group in self.param_groups for partition in group["params"]]


@dataclass
class Ranks:
    """What DeepSpeed asks about groups of ranks, by its own names (an "mpu").

    It wants the ranks of a model-parallel group for the norm of the whole gradient, which it does not have to know here; so every
    rank says that it is alone.
    """

    data: Group
    """The ranks that divide the parameters."""
    alone: Group
    """This rank."""

    def get_data_parallel_group(self) -> ProcessGroup:
        return self.data.process_group

    def get_data_parallel_world_size(self) -> int:
        return self.data.size

    def get_data_parallel_rank(self) -> int:
        return self.data.rank

    def get_model_parallel_group(self) -> ProcessGroup:
        return self.alone.process_group

    def get_model_parallel_world_size(self) -> int:
        return 1

    def get_model_parallel_rank(self) -> int:
        return 0


class Subset(nn.Module):
    """A module with some of a model's parameters, whose forward pass is `call`. An engine around it touches no other parameters."""

    def __init__(self, members: Members, call: Callable[..., Any]) -> None:
        super().__init__()
        for entries in members.values():
            for entry in entries:
                self.register_parameter(entry.name.replace(".", "/"), entry.parameter)
        self._call = partial(call)  # a module would become a part of this module

    def forward(self, *inputs: Any) -> Any:
        return self._call(*inputs)


class Zero(ABC):
    """An engine of DeepSpeed around `module`, and this rank's parts of its trained parameters, `members`. Collective."""

    def __init__(self, library: Any, module: nn.Module, members: Members, ranks: Ranks, config: dict[str, Any]) -> None:
        self.members, self.group = members, ranks.data
        self.scale = float(self.group.size)
        """The factor between DeepSpeed's gradients, averages over the ranks, and their sums."""
        self._library, self._optimizer, self._ranks = library, FlatOptimizer(list(members.values())), ranks
        with quiet():
            self.engine, *_ = library.initialize(model=module, optimizer=self._optimizer, config=config, mpu=self._ranks)
        self.parts = list(self._parts())

    @abstractmethod
    def _parts(self) -> Iterator[ZeroPart]:
        """Yields this rank's part of the parameters of each of `members`."""

    @abstractmethod
    def begin(self) -> None:
        """Clears gradients that DeepSpeed would use again for a parameter that takes no part in the next step."""

    @abstractmethod
    def gradients(self, place: int) -> Sequence[torch.Tensor]:
        """Returns the reduced gradient of the part at index `place`, in pieces, one after the other."""

    def flat_gradients(self) -> Sequence[torch.Tensor]:
        """Returns the tensors that hold gradients of this rank also between steps."""
        return []

    def reduction_buffers(self) -> Sequence[torch.Tensor]:
        """Returns the tensors in which gradients are collected for their reduction, if they exist from the start."""
        return []

    @abstractmethod
    def copies(self, place: int) -> Sequence[torch.Tensor]:
        """Returns this rank's copies of the working weights of the part at index `place`, as in StateShard."""

    @abstractmethod
    def publish(self) -> None:
        """Makes the working weights of all ranks anew from the master weights. Collective."""

    def step(self, update: Update | None) -> bool:
        """Does DeepSpeed's step, which leaves no gradients behind, also if it changes no weights (`update` None). Returns whether
        DeepSpeed has called `update`. Collective."""
        self._use_own_group()
        self._optimizer.update = update
        self.engine.step()
        self._optimizer.update = None
        return bool(self.engine.was_step_applied())

    def _use_own_group(self) -> None:
        self._library.utils.groups.mpu = self._ranks  # of which DeepSpeed has one in a process, for the newest engine

    def close(self) -> None:
        self.engine.destroy()
        self._library.utils.groups.mpu = None
        for entry in (entry for entries in self.members.values() for entry in entries):
            vars(entry.parameter).clear()  # DeepSpeed's functions there refer to the parameter, and would keep it


class FlatZero(Zero):
    """ZeRO-1 and 2: every rank has all working weights, in flat tensors, of which it updates a part."""

    def _parts(self) -> Iterator[ZeroPart]:
        mappings = self.engine.optimizer.state_dict()["param_slice_mappings"]
        groups = zip(self.members.items(), self._optimizer.partitions(), mappings, strict=True)
        for (kind, entries), partition, mapping in groups:
            part = flat_part(kind, self.group, entries, partition.detach())
            places = [(self.engine.param_names[entry.parameter], start, count) for entry, start, _, count in part.entries]
            require_layout(places == [(name, address.start, address.numel) for name, address in mapping.items()])
            yield part

    @property
    def _adds_in_flat_tensors(self) -> bool:
        """Whether DeepSpeed uses its optimizer for bfloat16 in ZeRO-1, which adds all gradients to flat tensors in float32."""
        return hasattr(self.engine.optimizer, "get_grads_for_reduction")

    def flat_gradients(self) -> Sequence[torch.Tensor]:
        return list(self.engine.optimizer.get_grads_for_reduction()[0]) if self._adds_in_flat_tensors else []

    def begin(self) -> None:
        if self._adds_in_flat_tensors:
            return  # its step clears them
        for partition in self._optimizer.partitions():
            if partition.grad is not None:  # with offload
                partition.grad.zero_()

    def gradients(self, place: int) -> Sequence[torch.Tensor]:
        partition = self._optimizer.partitions()[place]
        if self._adds_in_flat_tensors:
            size = partition.numel()
            return [self.engine.optimizer.get_grads_for_reduction()[0][place][size * self.group.rank :][:size]]
        return [partition.grad] if partition.grad is not None else list(self.engine.optimizer.averaged_gradients[place])

    def own_gradients(self, place: int, entries: Sequence[Entry]) -> Iterator[torch.Tensor]:
        """Yields, in ZeRO-1, the sums of this rank's gradients over the micro-batches, before their reduction. A parameter that
        took no part in the step has zeros."""
        for entry in entries:
            if self._adds_in_flat_tensors:
                yield self.engine.optimizer.get_grads_for_reduction()[0][place][entry.start :][: entry.parameter.numel()]
                continue
            gradient = self.engine.optimizer.get_gradient_for_reduction(entry.parameter)
            if gradient is None:
                gradient = torch.zeros_like(entry.parameter, dtype=accurate_dtype(entry.parameter.dtype))
                kept_as = "grad_accum" if self.engine.optimizer.use_grad_accum_attribute else "grad"
                setattr(entry.parameter, kept_as, gradient)
            yield gradient

    def reduce(self, ends: Group | None, before: Callable[[torch.Tensor], None] | None) -> None:
        """Reduces, in ZeRO-1, the gradients of a step; those that the first and the last stage share over `ends` first. Calls
        `before` with each of this rank's gradients. Collective."""
        for place, (kind, entries) in enumerate(self.members.items()):
            for gradient in self.own_gradients(place, entries):
                if before is not None:
                    before(gradient)
                if kind.tied and ends is not None:
                    ends.all_reduce(gradient)
        self._use_own_group()
        self.engine.set_gradient_accumulation_boundary(True)
        self.engine.allreduce_gradients(bucket_size=0)  # each flat tensor by itself: of several, DeepSpeed would make a copy

    def copies(self, place: int) -> Sequence[torch.Tensor]:
        entries, part = list(self.members.values())[place], self.parts[place]
        whole = entries[0].parameter.detach().as_strided((part.shard_weights.numel() * self.group.size,), (1,))
        return whole.chunk(self.group.size)

    def publish(self) -> None:
        self.engine.optimizer.update_lp_params()


class ShardedZero(Zero):
    """ZeRO-3: every rank has its part of each parameter, and all of a layer's only while it computes with them."""

    def __init__(self, library: Any, module: nn.Module, members: Members, ranks: Ranks, config: dict[str, Any]) -> None:
        # DeepSpeed numbers the parameters and modules of a process, and requires that the numbers are the same on all ranks. They
        # may have built different models before.
        library.zero.Init.param_id = 0
        super().__init__(library, module, members, ranks, config)
        for number, part in enumerate(module.modules()):
            part.ds_id = number  # type: ignore[assignment]

    def _parts(self) -> Iterator[ZeroPart]:
        flat = self.engine.optimizer.fp32_partitioned_groups_flat
        for (kind, entries), masters in zip(self.members.items(), flat, strict=True):
            last = self._library.utils.safe_get_local_fp32_param(entries[-1].parameter)
            at_end = last.data_ptr() + last.nbytes == masters.data_ptr() + masters.nbytes
            require_layout(at_end or last.device != masters.device)  # with offload DeepSpeed returns a copy on the device
            yield sharded_part(kind, self.group, entries, masters.detach())

    def begin(self) -> None:
        for entries in self.members.values():
            for entry in entries:
                parameter: Any = entry.parameter
                self._library.utils.safe_set_local_grad(parameter, torch.zeros_like(parameter.ds_tensor))

    def gradients(self, place: int) -> Sequence[torch.Tensor]:
        entries = list(self.members.values())[place]
        return [self._library.utils.safe_get_local_grad(entry.parameter) for entry in entries]

    def flat_gradients(self) -> Sequence[torch.Tensor]:
        return [self.engine.optimizer.grad_partitions_flat_buffer]

    def reduction_buffers(self) -> Sequence[torch.Tensor]:
        buffers = (bucket.buffer for bucket in self.engine.optimizer.ipg_buckets.values())
        return [buffer for buffer in buffers if buffer is not None]

    def copies(self, place: int) -> Sequence[torch.Tensor]:
        parameters: list[Any] = [entry.parameter for entry in list(self.members.values())[place]]
        return [joined([parameter.ds_tensor for parameter in parameters])]

    def publish(self) -> None:
        for place, part in enumerate(self.parts):
            self.copies(place)[0].copy_(part.shard_weights)
        for parameter in self.engine.optimizer.persistent_parameters:  # of which DeepSpeed keeps a whole copy on every rank
            parameter.partition()  # drops that copy; DeepSpeed gathers a new one when it needs it

    def close(self) -> None:
        super().close()
        modules = self._library.runtime.zero.parameter_offload.FWD_MODULE_STACK
        if self.engine.module in modules:  # or DeepSpeed would keep the model for the rest of the process
            modules.remove(self.engine.module)

"""AdamW over the shards of the gradient buckets: master weights and moments exist only for this rank's part.

The arithmetic is torch.optim.AdamW's fused kernel. For 16-bit models the shards have float32 master weights of their own and
the working weights are those, rounded; otherwise the working weights are the master weights.
"""

from collections.abc import Iterator

import torch

from bagualu.fault_tolerance.checkpoint.load import Request
from bagualu.fault_tolerance.checkpoint.shard import Piece
from bagualu.parallel.boxes import flat_range_to_boxes
from bagualu.parallel.data import Bucket, gather_weights
from bagualu.trainer.optim.config import OptimConfig

MOMENTS = ("exp_avg", "exp_avg_sq")


class ShardedAdamW:
    """Updates every bucket's shard, then gathers the working weights (ZeRO-1 where buckets are partitioned)."""

    def __init__(self, buckets: list[Bucket], config: OptimConfig) -> None:
        self.buckets = buckets
        self.masters = [_master(bucket) for bucket in buckets]
        groups = [
            {"params": [m for b, m in zip(buckets, self.masters, strict=True) if b.kind.decayed == decayed], "weight_decay": decay}
            for decayed, decay in ((True, config.weight_decay), (False, 0.0))
        ]
        betas = (config.betas[0], config.betas[1])
        self.adamw = torch.optim.AdamW([g for g in groups if g["params"]], betas=betas, eps=config.epsilon, fused=True)
        for master in self.masters:
            self.adamw.state[master] = {
                "step": torch.zeros((), dtype=torch.float32, device=master.device),
                **{moment: torch.zeros_like(master) for moment in MOMENTS},
            }

    def step(self, lr: float, gradient_factor: float) -> None:
        """Update with the reduced gradients times `gradient_factor` (clipping, loss scale)."""
        for group in self.adamw.param_groups:
            group["lr"] = lr
        for bucket, master in zip(self.buckets, self.masters, strict=True):
            if gradient_factor != 1.0:
                bucket.shard_gradients.mul_(gradient_factor)
            master.grad = bucket.shard_gradients
        self.adamw.step()
        self.publish()

    def shards(self) -> list[dict[str, torch.Tensor]]:
        """For every bucket this rank's shard of the state, by kind."""
        return [{**dict(self._state(master)), "step": self.adamw.state[master]["step"]} for master in self.masters]

    def publish(self) -> None:
        """Make the working weights of all ranks from the master weights. Collective."""
        for bucket, master in zip(self.buckets, self.masters, strict=True):
            if master.data_ptr() != bucket.shard_weights.data_ptr():
                bucket.shard_weights.copy_(master)
        gather_weights(self.buckets)

    def pieces(self) -> Iterator[Piece]:
        """Master weights and moments of the elements that this rank owns, as boxes of the global tensors."""
        for bucket, master in zip(self.buckets, self.masters, strict=True):
            if bucket.owned:
                for kind, tensor in self._state(master):
                    for name, shape, offset, view in _boxes(bucket, tensor):
                        yield Piece(f"{kind}/{name}", shape, offset, view)

    def incoming(self) -> "Incoming":
        """Fresh memory to read a state into."""
        return Incoming(self)

    def _put(self, master: torch.Tensor, fresh: dict[str, torch.Tensor], updates: int) -> None:
        """Make `fresh` (host memory) the state of `master`, after `updates` updates."""
        master.copy_(fresh["weight"])
        for moment in MOMENTS:
            self.adamw.state[master][moment] = fresh[moment].to(master.device)
        self.adamw.state[master]["step"].fill_(updates)

    def _state(self, master: torch.Tensor) -> list[tuple[str, torch.Tensor]]:
        return [("weight", master), *((moment, self.adamw.state[master][moment]) for moment in MOMENTS)]


class Incoming:
    """A state on its way in, in host memory of its own: the optimizer and the model stay as they are until `apply`."""

    def __init__(self, optimizer: ShardedAdamW) -> None:
        self._optimizer = optimizer
        self._fresh = [
            _fresh(bucket, dict(optimizer._state(master)))
            for bucket, master in zip(optimizer.buckets, optimizer.masters, strict=True)
        ]

    def requests(self) -> Iterator[tuple[tuple[int, ...], Request]]:
        """What to read: (global shape, request) for every box of weights and moments that this rank holds."""
        for bucket, fresh in zip(self._optimizer.buckets, self._fresh, strict=True):
            for kind, tensor in fresh.items():
                for name, shape, offset, view in _boxes(bucket, tensor):
                    yield shape, Request(f"{kind}/{name}", offset, view)

    def apply(self, updates: int) -> None:
        """The state of the optimizer, and of the model, is now what was read. Collective."""
        for master, fresh in zip(self._optimizer.masters, self._fresh, strict=True):
            self._optimizer._put(master, fresh, updates)
        self._optimizer.publish()


def _fresh(bucket: Bucket, state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Host memory in the form of a shard's `state`; what pads the shard, which no checkpoint holds, is zero as it always is."""
    used = sum(numel for *_, numel in bucket.shard_entries())
    fresh = {kind: torch.empty(tensor.shape, dtype=tensor.dtype) for kind, tensor in state.items()}
    for tensor in fresh.values():
        tensor[used:].zero_()
    return fresh


def _master(bucket: Bucket) -> torch.Tensor:
    working = bucket.shard_weights.detach()
    return working if working.dtype == bucket.gradients.dtype else working.to(bucket.gradients.dtype)


def _boxes(bucket: Bucket, tensor: torch.Tensor) -> Iterator[tuple[str, tuple[int, ...], tuple[int, ...], torch.Tensor]]:
    """(parameter name, global shape, offset, view) for every box of a global tensor that `tensor`, a shard, holds."""
    for entry, in_shard, in_parameter, numel in bucket.shard_entries():
        for flat, box in flat_range_to_boxes(entry.box.shape, in_parameter, in_parameter + numel):
            start = in_shard + flat - in_parameter
            view = tensor[start : start + box.elements].view(box.shape)
            yield entry.name, entry.global_shape, box.shift(entry.box.offset).offset, view

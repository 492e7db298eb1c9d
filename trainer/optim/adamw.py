"""AdamW over the shards of the gradient buckets: master weights and moments exist only for this rank's part.

The arithmetic is torch.optim.AdamW's fused kernel. For 16-bit models the shards have float32 master weights of their own and
the working weights are those, rounded; otherwise the working weights are the master weights.
"""

from collections.abc import Iterator

import torch

from bagualu.fault_tolerance.checkpoint.load import Checkpoint
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

    def load(self, checkpoint: Checkpoint, updates: int) -> None:
        """Take this rank's part out of a checkpoint that any layout wrote, after `updates` updates."""
        for bucket, master in zip(self.buckets, self.masters, strict=True):
            for kind, tensor in self._state(master):
                for name, _, offset, view in _boxes(bucket, tensor):
                    checkpoint.read(f"{kind}/{name}", offset, view)
            self.adamw.state[master]["step"].fill_(updates)
        self.publish()

    def _state(self, master: torch.Tensor) -> list[tuple[str, torch.Tensor]]:
        return [("weight", master), *((moment, self.adamw.state[master][moment]) for moment in MOMENTS)]


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

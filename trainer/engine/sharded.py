"""The part of an engine that does not depend on how gradients are reduced and weights are shared: the update of shards, the state
that checkpoints hold, and the gradient norm."""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence

import torch

from bagualu.comm.group import Group
from bagualu.fault_tolerance.guard.engine import StateShard
from bagualu.parallel.boxes import TensorPiece
from bagualu.parallel.data.shard import Shard, norm_squared, shard_pieces
from bagualu.parallel.memory_kinds import BUFFERS, GRADIENTS, MASTERS, MOMENTS, PARAMETERS
from bagualu.parallel.pipeline.runtime import Slices
from bagualu.parallel.precision import accurate_dtype
from bagualu.parallel.untrained import Untrained
from bagualu.trainer.models.decoder.model import Decoder
from bagualu.trainer.optim.sharded import ShardedOptimizer


class ShardedEngine(ABC):
    """An `Engine` (protocol.py) without begin, putting_off, finish, shards, working_weights and close. It updates `parts`,
    this rank's shards of the trained parameters, with `optimizer`. `frozen` are shards whose weights stay; frozen parameters that
    are not divided among ranks are in `untrained`, with the buffers."""

    def __init__(
        self,
        model: Decoder,
        parts: Sequence[Shard],
        frozen: Sequence[Shard],
        untrained: list[Untrained],
        optimizer: ShardedOptimizer,
        world: Group,
    ) -> None:
        self.model, self.frozen, self.untrained, self.optimizer = model, frozen, untrained, optimizer
        self._parts, self._world = parts, world

    @property
    def slices(self) -> Slices:
        return self.model

    @property
    def parameters(self) -> int:
        shards = (part for part in [*self._parts, *self.frozen] if part.owned)
        pieces = [piece for part in shards for piece in shard_pieces("weight", part, part.shard_weights)]
        whole = [part.piece(part.tensor) for part in self.untrained if part.owned and part.kind == "weight"]
        return sum(piece.tensor.numel() for piece in [*pieces, *filter(None, whole)])

    def leaves(self) -> Iterator[tuple[str, torch.Tensor]]:
        return self.model.named_parameters()

    def norm_squared(self) -> torch.Tensor:
        norms = {owned: self._zero() for owned in (True, False)}
        for part in self._parts:
            norms[part.owned] += norm_squared(part.shard_gradients)
        return norms[True] + norms[False] * 0.0  # a copy does not count, but makes the sum not finite when it is not

    def _zero(self) -> torch.Tensor:
        return torch.zeros((), dtype=torch.float64, device=self._world.device)

    def reduced_gradients(self) -> Iterator[torch.Tensor]:
        return (part.shard_gradients for part in self._parts)

    def step(self, lr: float, gradient_factor: float) -> None:
        self.optimizer.step(lr, gradient_factor)

    def spoilt(self) -> list[tuple[int, str]]:
        return self.optimizer.spoilt()

    def open(self) -> None:
        self.optimizer.open(self._world)

    def publish(self) -> None:
        self.optimizer.publish()

    @abstractmethod
    def working_weights(self) -> Iterator[Sequence[torch.Tensor]]:
        """Yields, for each of `parts`, the working weights that this rank keeps between steps."""

    def held(self) -> Iterator[tuple[str, torch.Tensor]]:
        for part, state, working in zip(self._parts, self.optimizer.shards(), self.working_weights(), strict=True):
            yield from ((PARAMETERS, tensor) for tensor in working)
            yield GRADIENTS, part.shard_gradients
            storages = [tensor.untyped_storage() for tensor in working]
            if all(state["weight"].untyped_storage() is not storage for storage in storages):
                yield MASTERS, state["weight"]
            yield from ((MOMENTS, tensor) for kind, tensor in state.items() if kind not in ("weight", "step"))
        yield from ((PARAMETERS, part.shard_weights) for part in self.frozen)
        yield from ((PARAMETERS if part.kind == "weight" else BUFFERS, part.tensor) for part in self.untrained)

    def pieces(self) -> Iterator[TensorPiece]:
        yield from self.optimizer.pieces()
        for part in self.frozen:
            if part.owned:
                yield from shard_pieces("weight", part, part.shard_weights.to(accurate_dtype(part.shard_weights.dtype)))
        owned = (part for part in self.untrained if part.owned)
        yield from filter(None, (part.piece(part.tensor.to(part.saved_dtype)) for part in owned))

    def incoming(self) -> "IncomingShards":
        return IncomingShards(self)


class IncomingShards:
    """The `IncomingState` (protocol.py) of a ShardedEngine: host memory for every weight, moment and buffer of this rank."""

    def __init__(self, engine: ShardedEngine) -> None:
        self._engine = engine
        self._trained = engine.optimizer.incoming()
        self._frozen = [(part, _fresh(part.shard_weights)) for part in engine.frozen]
        self._untrained = [(part, _fresh(part.tensor)) for part in engine.untrained]

    def pieces(self) -> Iterator[TensorPiece]:
        yield from self._trained.pieces()
        for part, fresh in self._frozen:
            yield from shard_pieces("weight", part, fresh)
        yield from filter(None, (part.piece(fresh) for part, fresh in self._untrained))

    def apply(self, updates: int) -> None:
        self._trained.apply(updates)
        for shard, fresh in self._frozen:
            shard.shard_weights.copy_(fresh)
        for part, fresh in self._untrained:
            part.tensor.copy_(fresh)
        self._engine.publish()


def untrained_shard(part: Untrained) -> StateShard:
    """Returns a buffer or frozen parameter as the guard sees it."""
    tensor = part.tensor.detach()
    return StateShard(part.name, {"weight": tensor}, part.placement.reduction_axis, part.group, part.held_along, (tensor,))


def _fresh(tensor: torch.Tensor) -> torch.Tensor:
    """Returns zeroed host memory for what a checkpoint holds of `tensor`, in at least float32."""
    return torch.zeros_like(tensor, dtype=accurate_dtype(tensor.dtype), device="cpu")

"""An optimizer over shards of parameters: a rank holds master weights and moments only for its own shards.

For 16-bit models, shards have separate float32 master weights and the working weights are these, rounded; otherwise the working
weights are the master weights.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from bagualu.comm.group import Group
from bagualu.fault_tolerance.guard.finite import is_finite, probe
from bagualu.parallel.boxes import TensorPiece
from bagualu.parallel.data.shard import Shard, shard_pieces
from bagualu.parallel.matrices import WholeMatrices
from bagualu.parallel.precision import chip_of
from bagualu.trainer.operators.update import PIECE, adamw, same_memory
from bagualu.trainer.optim.config import OptimConfig
from bagualu.trainer.optim.groups import Treatment
from bagualu.trainer.optim.muon import adjustment, cost, orthogonalise
from bagualu.trainer.optim.rounding import element_numbers, noise, round_stochastically
from bagualu.trainer.optim.rules import MuonStep, Rule, ShardSlice, rule_of


class ShardedOptimizer:
    """Updates this rank's shards. The engine then sends the working weights to the ranks that need them."""

    def __init__(
        self,
        parts: Sequence[Shard],
        config: OptimConfig,
        device: torch.device | None = None,
        seed: int = 0,
        update: Callable[..., None] = adamw,
    ) -> None:
        """`seed` determines how moments in bfloat16 are rounded. `update`: the variant of the operator, by which AdamW updates."""
        self.parts, self._config, self._seed, self._operator = parts, config, seed, update
        self._half = config.moments_dtype == "bfloat16"
        dtype = torch.bfloat16 if self._half else None
        self._shards = [_shard(_master(part), config.moments(_treatment(part).optimizer), dtype) for part in parts]
        self._by_muon = [index for index, part in enumerate(parts) if _treatment(part).optimizer == "muon"]
        self._read: Callable[[torch.Tensor], list[Any]] = torch.Tensor.tolist
        """Returns the values of a tensor."""
        self._matrices: WholeMatrices | None = None
        """The matrices that muon updates; None for other optimizers."""
        self._probed = torch.zeros((), dtype=torch.float64, device=device)
        """A sum that is not finite if the last `step` left values that are not finite; in rare cases also if all values are
        finite."""

    def open(self, group: Group) -> None:
        """Finds out which ranks of `group`, all ranks, hold the other parts of the matrices that muon updates. Call it before the
        first `step`. Collective."""
        self._read = group.read
        if self._config.name == "muon":
            self._matrices = WholeMatrices(list(self._of_muon(lambda part: part.shard_weights)), cost, group)

    def step(self, lr: float, gradient_factor: float, updated: Callable[[int], None] = lambda index: None) -> None:
        """Updates this rank's shards with the reduced gradients times `gradient_factor` (clipping, loss scale), and overwrites the
        gradients. Calls `updated` with the index of each part once its shard is up to date. Collective.

        `spoilt` tells which values are then not finite.
        """
        self.begin_step()
        for index in range(len(self.parts)):
            self.step_shard(index, lr, gradient_factor)
            if index not in self._by_muon:
                updated(index)
        if self._config.name == "muon":
            self._orthogonalise()
        for index in self._by_muon:
            for piece in _slices(self.parts[index].shard_gradients):
                self._update(index, piece, MuonStep(), (), lr, 1.0)
            updated(index)

    def begin_step(self) -> None:
        """Call before the calls of `step_shard` for all shards, which together do what `step` does without Muon."""
        self._probed.zero_()

    def step_shard(self, index: int, lr: float, gradient_factor: float) -> None:
        """Updates the shard of the part at this index."""
        part = self.parts[index]
        optimizer = _treatment(part).optimizer
        rule, moments = rule_of(self._config, optimizer, self._operator), self._config.moments(optimizer)
        self._shards[index]["step"] += 1
        for piece in _slices(part.shard_gradients):
            self._update(index, piece, rule, moments, lr, gradient_factor)

    def _update(
        self, index: int, piece: slice, rule: Rule, kinds: Sequence[str], lr: float, gradient_factor: float
    ) -> None:  # fmt: skip
        """Updates a piece of a shard, with its moments of these `kinds`, and probes the result while it is still in the processor's
        cache, which is much faster than reading it from memory again."""
        part, shard = self.parts[index], self._shards[index]
        gradient, working = part.shard_gradients[piece], part.shard_weights[piece]
        weight, kept = shard["weight"][piece], {moment: shard[moment][piece] for moment in kinds}
        moments = {moment: values.to(weight.dtype) for moment, values in kept.items()}  # the same tensors unless they are bfloat16
        treatment = _treatment(part)
        updated = ShardSlice(weight, working, gradient, moments, shard["step"])
        rule.update(updated, lr * treatment.lr_factor, treatment.weight_decay, gradient_factor)
        if self._half and moments:
            (step,) = self._read(shard["step"].view(1))
            self._round(part, piece, moments, kept, int(step))
        self._probed += probe(working)
        if rule.telling:
            self._probed += probe(moments[rule.telling])
            if self._half:  # rounding up may exceed the range
                self._probed += probe(kept[rule.telling])

    def _of_muon(self, tensor: Callable[[Shard], torch.Tensor]) -> Iterator[TensorPiece]:
        """Yields what `tensor` returns for this rank's shards that muon updates, as boxes of the global tensors."""
        parts = (self.parts[index] for index in self._by_muon)
        return (piece for part in parts for piece in shard_pieces("direction", part, tensor(part)))

    def _orthogonalise(self) -> None:
        """Replaces the momenta in the gradients of muon's shards by the directions in which their matrices move: orthogonal, and
        scaled as optim.adjust_lr says."""
        assert self._matrices is not None, "open comes before step"
        momenta = list(self._of_muon(lambda part: part.shard_gradients))
        wide = momenta and momenta[0].tensor.dtype == torch.float64
        self._matrices.replace(momenta, orthogonalise, torch.float64 if wide else torch.bfloat16)
        for part in (self.parts[index] for index in self._by_muon):
            for entry, start, _, numel in part.shard_entries():
                part.shard_gradients[start : start + numel].mul_(adjustment(self._config.adjust_lr, entry.global_shape))

    def _round(self, part: Shard, piece: slice, moments: dict[str, torch.Tensor], kept: dict[str, torch.Tensor], step: int) -> None:
        """Rounds `moments` of a piece of a shard stochastically to `kept`."""
        for entry, in_shard, in_parameter, numel in part.shard_entries():
            begin, end = max(piece.start, in_shard), min(piece.stop, in_shard + numel)
            if begin >= end:
                continue
            first = in_parameter + begin - in_shard
            numbers = element_numbers(entry, first, first + end - begin, self._probed.device)
            here = slice(begin - piece.start, end - piece.start)
            bits = noise(self._seed, entry.name, numbers, step, math.prod(entry.global_shape))
            for half, (moment, values) in enumerate(moments.items()):  # at most two moments, each with 16 bits of its own
                kept[moment][here] = round_stochastically(values[here], (bits >> 16 * half) & 0xFFFF)

    def spoilt(self) -> list[tuple[int, str]]:
        """Returns (index of the shard, kind of state) of every tensor of this rank's state that the last `step` left not finite."""
        if all(map(math.isfinite, self._read(self._probed.view(1)))):
            return []
        found = []
        for index, (part, shard) in enumerate(zip(self.parts, self._shards, strict=True)):
            found += [(index, kind) for kind, tensor in _saved(shard).items() if not is_finite(tensor)]
            if is_finite(shard["weight"]) and not is_finite(part.shard_weights):  # the master weight exceeds the range of float16
                found.append((index, "working copy"))
        return found

    def shards(self) -> list[dict[str, torch.Tensor]]:
        """Returns this rank's shard of the state of each part, by kind: weight (the master), the moments, step (number of
        updates).

        These are the tensors themselves, not copies.
        """
        return self._shards

    def publish(self) -> None:
        """Computes the working weights of this rank's shards from the master weights."""
        for part, shard in zip(self.parts, self._shards, strict=True):
            if not same_memory(shard["weight"], part.shard_weights):
                part.shard_weights.copy_(shard["weight"])

    def pieces(self) -> Iterator[TensorPiece]:
        """Yields the master weights and moments of the elements that this rank owns, as boxes of the global tensors."""
        for part, shard in zip(self.parts, self._shards, strict=True):
            if part.owned:
                for kind, tensor in _saved(shard).items():
                    yield from shard_pieces(kind, part, tensor)

    def incoming(self) -> "Incoming":
        """Returns new host memory to read a state into."""
        return Incoming(self)

    def _put(self, place: int, fresh: dict[str, torch.Tensor], updates: int) -> None:
        """Makes `fresh`, in host memory, the state of the shard at index `place`, after `updates` updates. On a CPU the tensors of
        `fresh` become the moments without a copy."""
        shard = self._shards[place]
        shard["weight"].copy_(fresh["weight"])  # in place: it may be the working weights themselves
        for moment in fresh.keys() - {"weight"}:
            shard[moment] = fresh[moment].to(shard["weight"].device)
        shard["step"].fill_(updates)


class Incoming:
    """A state that is being read, in host memory of its own: the optimizer and the model do not change until `apply`."""

    def __init__(self, optimizer: ShardedOptimizer) -> None:
        self._optimizer = optimizer
        self._fresh = [_fresh(shard) for shard in optimizer.shards()]

    def pieces(self) -> Iterator[TensorPiece]:
        """Yields the memory to fill: every box of weights and moments that this rank holds."""
        for part, fresh in zip(self._optimizer.parts, self._fresh, strict=True):
            for kind, tensor in fresh.items():
                yield from shard_pieces(kind, part, tensor)

    def apply(self, updates: int) -> None:
        """Makes the state that was read that of the optimizer. `updates`: the number of updates that led to it."""
        for place, fresh in enumerate(self._fresh):
            self._optimizer._put(place, fresh, updates)


def _treatment(part: Shard) -> Treatment:
    assert isinstance(part.treatment, Treatment)
    return part.treatment


def _slices(shard: torch.Tensor) -> Iterator[slice]:
    """Yields the slices of a shard that are updated one after the other. An accelerator, slow to launch, updates the whole shard in
    one call."""
    size = PIECE if chip_of(shard.device) == "cpu" else max(1, shard.numel())
    return (slice(start, start + size) for start in range(0, shard.numel(), size))


def _shard(master: torch.Tensor, kinds: tuple[str, ...], dtype: torch.dtype | None) -> dict[str, torch.Tensor]:
    """Returns the optimizer state of a shard before the first update, by kind; `master` becomes its master weights, not a copy."""
    moments = {moment: torch.zeros_like(master, dtype=dtype) for moment in kinds}
    return {"weight": master, **moments, "step": torch.zeros((), dtype=torch.float32, device=master.device)}


def _saved(shard: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Returns the tensors of a shard's state that have a value per element and that checkpoints hold: all but "step"."""
    return {kind: tensor for kind, tensor in shard.items() if kind != "step"}


def _fresh(shard: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Returns zeroed host memory in the form of `shard`. Padding, which no checkpoint holds, stays zero."""
    return {kind: torch.zeros(tensor.shape, dtype=tensor.dtype) for kind, tensor in _saved(shard).items()}


def _master(part: Shard) -> torch.Tensor:
    working = part.shard_weights.detach()
    return working if working.dtype == part.shard_gradients.dtype else working.to(part.shard_gradients.dtype)

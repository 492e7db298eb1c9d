"""Validation: computes the loss on a fixed set of held-out sequences, and the bits per byte of their text."""

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch

from bagualu.comm.agree import summed
from bagualu.parallel.pipeline.program import program
from bagualu.parallel.pipeline.runtime import MicroBatch
from bagualu.parallel.pipeline.schedules.schedule import forward_only, with_messages
from bagualu.parallel.vocabulary import IGNORED
from bagualu.trainer.assemble import TrainerState
from bagualu.trainer.data.config import STREAM
from bagualu.trainer.data.tokenised import bits_per_byte


@dataclass(frozen=True)
class Validation:
    loss: float
    """Mean cross-entropy, in nats per token."""
    bits_per_byte: float | None
    """Cross-entropy in bits per byte of text; None if the tokens stand for no text (random data)."""
    expert_loads: dict[int, list[int]]
    """By the number of each mixture layer, how many tokens each expert got."""
    losses: dict[str, float] = field(default_factory=dict)
    """In a blend, the loss of each source by its name."""

    @property
    def expert_imbalance(self) -> float:
        """How many times the mean load the fullest expert has, the most of all layers."""
        return max(max(loads) * len(loads) / max(1, sum(loads)) for loads in self.expert_loads.values())


def validate(state: TrainerState) -> Validation | None:
    """Returns the loss over `train.validation_sequences` sequences of the validation split, or over all if it has fewer; in a
    blend, over as many of each source. The result is the same on every rank; None for 0 sequences. Collective."""
    most = state.recipe.train.validation_sequences
    sets = {name: _spread(own, most) for name, own in state.batches.validation_sets.items()} if most else {}
    sets = {name: chosen for name, chosen in sets.items() if chosen}
    if not sets:
        return None
    with state.engine.model.counting_loads() as loads:
        sums = {name: _sums(state, chosen) for name, chosen in sets.items()}
    nats, total_bytes, tokens = (sum(column) for column in zip(*sums.values(), strict=True))
    losses = {name: each[0] / max(1.0, each[2]) for name, each in sums.items()} if state.corpus.blend else {}
    return Validation(nats / max(1.0, tokens), bits_per_byte(nats, total_bytes), _sum_loads(state, loads), losses)


def _spread(sequences: range, most: int) -> list[int]:
    """Returns at most `most` of `sequences`, spread evenly over them."""
    count = min(most, len(sequences))
    return [sequences[index * len(sequences) // count] for index in range(count)]


def _sums(state: TrainerState, chosen: list[int]) -> list[float]:
    """Returns the summed loss of these validation sequences in nats, the bytes of text and the number of their labels.
    Collective."""
    micro_batches = _share(state, chosen)
    schedule = with_messages(forward_only(state.mesh.placement, len(micro_batches)))
    totals = state.runner.run(program(schedule, state.mesh.at("pipeline")), micro_batches, seeds=None)
    labels = torch.stack([batch.labels for batch in micro_batches])
    counted = labels[labels != IGNORED]
    text_bytes = torch.as_tensor(state.corpus.token_bytes, device=state.device)[counted].sum()
    # Every stage and tensor rank has the labels, but only the rank that holds the loss counts them.
    once = float(state.mesh.last_stage and state.mesh.reports)
    tokens_here = counted.new_tensor(counted.numel())
    return list(state.mesh.sum_over("world", totals.loss * once, text_bytes * once, tokens_here * once))


def _sum_loads(state: TrainerState, loads: Mapping[int, torch.Tensor]) -> dict[int, list[int]]:
    """Returns the loads of the experts of all layers, given those of this rank's tokens and layers. Collective."""
    model, world = state.recipe.model, state.mesh.group("world")
    layers = [layer for layer in range(model.layers) if model.is_moe_layer(layer)]
    if not layers:
        return {}
    counts = torch.zeros(len(layers), model.moe.experts, dtype=torch.float64, device=state.device)
    for index, layer in enumerate(layers):
        if layer in loads and state.mesh.reports:
            counts[index] = loads[layer]
    return {layer: list(map(int, row)) for layer, row in zip(layers, world.read(summed(counts, world)), strict=True)}


def _share(state: TrainerState, chosen: list[int]) -> list[MicroBatch]:
    """Returns, in whole micro-batches, this data rank's share of the validation sequences `chosen`. Rows that fill up the last
    micro-batches have labels that the loss ignores."""
    size, ranks, data_rank = state.recipe.train.micro_batch, state.mesh.layout.data, state.mesh.at("data")
    rounds = -(-len(chosen) // (size * ranks))
    shares = []
    for index in range(rounds):
        start = (index * ranks + data_rank) * size
        sequences = [state.batches.validation(number, 1) for number in chosen[start : start + size]]
        inputs = torch.zeros(size, state.recipe.data.sequence_length, dtype=torch.int64)
        labels = torch.full_like(inputs, IGNORED)
        documents = torch.zeros_like(inputs)
        for row, tensors in enumerate(sequences):
            for whole, tensor in zip((inputs, labels, documents), tensors, strict=False):
                whole[row] = tensor[0]
        parts = (inputs, labels, documents) if state.recipe.data.packing != STREAM else (inputs, labels)
        shares.append(MicroBatch(*(part.to(state.device) for part in parts)))
    return shares

"""Predicts the most memory that each rank of a run takes, by kind, from the recipe alone.

The prediction has the state of each rank (state.py, with the padding of buckets.py), and the schedule's moment at which
activations take most (activations.py, parallel/balance/stages). Gradients that do not exist at that moment count as if they did,
and only what activations take beyond them counts as activations. It leaves out what a transport keeps for itself, such as NCCL's
buffers, the copies for checkpoints that are written in the background, and the matrices that muon brings together. Of FSDP2's own
buffers it has only those of `unit_transfers`, so a run with this engine may take more.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from bagualu.parallel.balance.stages.activations import Activations
from bagualu.parallel.balance.stages.cost import CostTable, LayerCost, joined
from bagualu.parallel.balance.stages.forecast import Split
from bagualu.parallel.balance.stages.memory import worst_passes
from bagualu.parallel.balance.stages.problem import Piece, Problem
from bagualu.parallel.layout import Layout
from bagualu.parallel.memory_kinds import ACTIVATIONS, BUFFERS, COMMUNICATION, KINDS
from bagualu.parallel.pipeline.layer_slice import cut_inside, parts_of
from bagualu.parallel.pipeline.schedules.schedule import Schedule
from bagualu.trainer.costs.activations import inside_bytes
from bagualu.trainer.costs.analytic import analytic_table
from bagualu.trainer.costs.buckets import (
    PlannedBucket,
    Transfers,
    begun_gradients,
    buckets_state,
    plan_buckets,
    reductions_at_the_end,
    transfers,
    unit_transfers,
)
from bagualu.trainer.costs.deepspeed_memory import deepspeed_buffers, deepspeed_transfers
from bagualu.trainer.costs.state import EMBEDDING, EMBEDDING_NORM, Layers, buffer_bytes, parameter_state, rank_parameters
from bagualu.trainer.costs.work import ModelWork, work_of
from bagualu.trainer.optim.config import OptimConfig
from bagualu.trainer.recipe.config import Recipe

Memory = dict[str, int]
"""Bytes by kind (memory_kinds.KINDS), which add up to the most that a rank takes at once."""
_TOKEN_BYTES = 16
"""Of a token's input and label."""
_UPDATED_AT_ONCE = 2**19
"""The number of elements that a CPU updates at once (optim/sharded.py)."""
_ROUNDING_BYTES = 40
"""Bytes per element for stochastic rounding: moments in float32, numbers of elements and random bits."""


def fullest(memories: list[Memory]) -> Memory:
    """Returns the memory of the rank that takes most."""
    return max(memories, key=lambda memory: sum(memory.values()))


def memory_text(memory: Memory) -> str:
    """Formats the memory of a rank as a sum of its kinds."""
    kinds = (f"{size_text(size)} {kind.replace('_', ' ')}" for kind, size in memory.items() if size)
    return f"{size_text(sum(memory.values()))} ({', '.join(kinds)})"


def size_text(size: int) -> str:
    """Formats a number of bytes in GiB, MiB or KiB."""
    unit, name = next(((2**power, name) for power, name in ((30, "GiB"), (20, "MiB")) if size >= 2**power), (2**10, "KiB"))
    return f"{size / unit:.1f} {name}"


def predict(recipe: Recipe, layout: Layout, split: Split, schedule: Schedule, micro_batches: int | None = None) -> list[Memory]:
    """Returns the memory of each pipeline rank; data and tensor ranks take the same. `schedule`: of the data ranks with the most
    micro-batches; `micro_batches` is their number, by default that of the schedule."""
    work = work_of(recipe, layout)
    table = analytic_table(work)
    activations = Activations(tuple(split.recompute), offload_bytes=0 if work.on_cpu else recipe.train.offload_bytes)
    spare = split.forecast.spare_bytes if split.forecast and split.forecast.spare_bytes else [0] * layout.pipeline
    problem = Problem(table, schedule, [1.0] * layout.pipeline, None, activations, cut_inside(split.slices))
    passes = {first: worst_passes(schedule, first) for first in (True, False)}
    memories = []
    for rank in range(layout.pipeline):
        stages = schedule.placement.stages_of(rank)
        slices = [split.slices[stage] for stage in stages]
        layers = parts_of(slices)
        native = work.engine == "native"
        buckets = plan_buckets(work, recipe.optim, recipe.parallel.bucket_bytes, layers) if native else []
        state = buckets_state(work, buckets) + _outside_buckets(work, layers)
        state[BUFFERS] += _TOKEN_BYTES * work.tokens * (micro_batches or schedule.micro_batches)
        if work.engine == "deepspeed":
            state[COMMUNICATION] += deepspeed_buffers(work, _zero_optimization(recipe, layout))
        pieces = tuple(problem.pieces(slices))
        late, unused = Transfers(Counter(), Counter()), 0
        if native and (micro_batches or schedule.micro_batches) == 1:  # activations take the memory of gradients before these exist
            late, unused = begun_gradients(work, buckets, layers)
        whole = problem.with_table(_with_transfers(work, table, late)) if unused else problem
        alone = whole.transient_bytes(rank, pieces) - unused
        together = 0
        for first, of in passes.items():  # in the first backward pass of a step, no reductions of another are in progress
            moved = _moved(recipe, work, buckets, layers, 1 if first else 2, spare[rank])
            moving = problem.with_table(_with_transfers(work, table, moved.plus(late)))
            together = max(together, moving.transient_bytes(rank, pieces, passes=of[rank]) - unused)
        messages = 2 * table.output_bytes if layout.pipeline > 1 else 0  # one that is sent and one that is received
        state[ACTIVATIONS] += max(alone, _update_bytes(work, recipe.optim, buckets))
        if work.on_cpu:
            state[ACTIVATIONS] += _copied(problem, rank, pieces, recipe.train.offload_bytes)
        last = reductions_at_the_end(work, buckets, one_machine=recipe.launch.nodes == 1)
        state[COMMUNICATION] += max(together + messages, last) - alone
        memories.append({kind: state[kind] for kind in KINDS})
    return memories


def _copied(problem: Problem, rank: int, pieces: Sequence[Piece], offload_bytes: int) -> int:
    """Returns the bytes of a CPU's memory that hold activations a second time: those of the layer on its way to "host memory",
    which is the same memory, unless only layers before it have room there."""
    kept = [problem.kept_bytes(piece) for piece in pieces]
    moments = (zip(moment, kept, strict=True) for moment in problem.moments[rank])
    movable = max(sum(held * sum(layers) for (held, _), layers in moment) for moment in moments)
    largest = max((layer for layers in kept for layer in layers), default=0)
    return max(0, min(largest, offload_bytes - (movable - largest)))


def _moved(
    recipe: Recipe, work: ModelWork, buckets: list[PlannedBucket], layers: Layers, passes: int, keep_bytes: int
) -> Transfers:
    """Returns what a rank that holds these layers holds for transfers in the last of `passes` backward passes, if it may keep
    `keep_bytes` of gathered weights."""
    if work.engine == "fsdp":
        return unit_transfers(work, layers)
    if work.engine == "deepspeed":
        return deepspeed_transfers(work, _zero_optimization(recipe, work.layout), layers)
    return transfers(work, buckets, layers, passes, keep_bytes)


def _zero_optimization(recipe: Recipe, layout: Layout) -> Mapping[str, Any]:
    """Returns the section zero_optimization of DeepSpeed's configuration."""
    section: Mapping[str, Any] = recipe.deepspeed_terms(layout).library_config()["zero_optimization"]
    return section


def _outside_buckets(work: ModelWork, layers: Layers) -> Counter[str]:
    """Returns the bytes, by kind, of buffers and of parameters that are in no bucket: frozen ones below ZeRO-3, and all those of
    libraries."""
    state = Counter({BUFFERS: sum(buffer_bytes(work, *one) for one in layers.items())})
    for name, shape, _ in rank_parameters(work, layers):
        frozen = work.plan.global_name(name) in work.frozen
        if work.engine != "native" or (frozen and work.zero < 3):
            state += parameter_state(work, name, shape)
    return state


def _with_transfers(work: ModelWork, table: CostTable, moved: Transfers) -> CostTable:
    """Returns `table` with what is held for transfers while a layer computes as part of its work."""
    norm, head = work.model.layers, work.model.layers + 1
    after_loss = inside_bytes(work) + max(moved.backward[head], moved.backward[norm])
    before_loss = table.head.work_bytes + moved.forward[head]
    embedding = max(moved.backward[EMBEDDING], moved.backward[EMBEDDING_NORM])
    last_layer = table.output_bytes + moved.forward[norm - 1] - table.head.activation_bytes  # its forward pass
    return replace(
        table,
        embedding=replace(table.embedding, work_bytes=table.embedding.work_bytes + embedding),
        layers=[
            _with_work(one, moved.backward[i], moved.backward[i] - moved.of_attention[i]) if moved.backward[i] else one
            for i, one in enumerate(table.layers)
        ],
        head=replace(table.head, work_bytes=max(before_loss, after_loss, last_layer)),
    )


def _with_work(layer: LayerCost, *more: int) -> LayerCost:
    """Returns `layer` with `more` bytes of work in its attention and in its feed-forward."""
    return joined(
        layer.name, *(replace(half, work_bytes=half.work_bytes + own) for half, own in zip(layer.halves, more, strict=True))
    )


def _update_bytes(work: ModelWork, optim: OptimConfig, buckets: list[PlannedBucket]) -> int:
    """Returns the most bytes that the update of a piece of a shard takes for intermediate results."""
    elements = max((bucket.padded // (bucket.ranks if work.zero else 1) for bucket in buckets), default=0)
    each = _ROUNDING_BYTES if work.half_moments else work.accurate_bytes if optim.name == "lion" else 0
    return each * (min(elements, _UPDATED_AT_ONCE) if work.on_cpu else elements)

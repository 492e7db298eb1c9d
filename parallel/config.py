"""The parallelism settings of a recipe."""

from dataclasses import dataclass, field
from typing import Any

from bagualu.comm.checks import refuse_unused, require_at_least, require_known_home
from bagualu.comm.errors import RecipeError
from bagualu.parallel.balance.stages.keys import COMPUTED, memory_caps, validate_speeds
from bagualu.parallel.layout import Layout
from bagualu.parallel.pipeline.registry import placement_of, splits_backward

EXPERT_ROWS_MULTIPLE = 64
"""On a CPU, rows of experts in 16 bits are padded to a multiple of this (trainer/operators/ragged.py): on average by half of it for
each expert."""
HEAD_CHUNK_TOKENS = 2**10
"""Tokens per chunk in the fused head and loss (vocabulary.py). Every chunk reads the whole weight and its gradient, so small chunks
are slow; the products of larger chunks could overflow float16 before any loss scale can prevent it."""

ENGINES = {"native": (1, 0, 2, 3), "fsdp": (3,), "deepspeed": (1, 2, 3)}
"""The ZeRO stages that each engine has, the default first."""


@dataclass
class RebalanceConfig:
    """`parallel.rebalance.*`: moves layers between pipeline ranks during a run."""

    every: int | None = None
    """Steps between comparisons of the ranks' pass times; 0: layers never move. Default: 10 with balance=measured or analytic and
    several pipeline ranks, otherwise 0."""
    threshold: float = 0.05
    """The least predicted gain for which layers move, as a fraction of the step time."""
    windows: int = 3
    """Number of comparisons in a row that must show a gain of at least `threshold` before layers move. Every move doubles the
    number for a while, so that layers do not oscillate."""

    def validate(self) -> None:
        require_at_least(0, "parallel.rebalance", self, "every")
        require_at_least(1, "parallel.rebalance", self, "windows")
        if not 0 < self.threshold < 1:
            raise RecipeError(f"parallel.rebalance.threshold={self.threshold} must lie between 0 and 1, "
                              "e.g. parallel.rebalance.threshold=0.05")  # fmt: skip


@dataclass
class DeepSpeedConfig:
    """`parallel.deepspeed.*`: settings of parallel.engine=deepspeed."""

    config: str | None = field(default=None, metadata={"path": True})
    """A file with a configuration of DeepSpeed in JSON. Keys that the recipe decides (batch sizes, optimizer, clipping, precision,
    stage, schedule) must agree with it; DeepSpeed gets the others, of how it works (docs/guides/memory.md). Default: no file."""
    offload: str = "none"
    """What DeepSpeed keeps in the memory of the host and not of the device: none; optimizer (master weights and moments, which the
    CPU then updates); parameters (with parallel.zero=3: also each rank's part of the weights)."""

    def validate(self) -> None:
        require_known_home("parallel.deepspeed", self, "config")
        if self.offload not in ("none", "optimizer", "parameters"):
            raise RecipeError(f"parallel.deepspeed.offload={self.offload} is unknown; give one of none, optimizer, parameters")


@dataclass
class ParallelConfig:
    """`parallel.*` of a recipe: the degree of every axis, and the settings of each mechanism."""

    data: int | None = None
    """Number of replicas of the model. Default: the world size divided by tensor x pipeline x context."""
    tensor: int = 1
    """Number of ranks over which the matrix multiplications of a layer are split."""
    pipeline: int = 1
    """Number of ranks over which the layers are split."""
    expert: int = 1
    """Number of ranks over which the experts are split. These ranks are taken from the data x context ranks, so this degree divides
    their product."""
    context: int = 1
    """Number of ranks that share a sequence. Only 1 is supported so far."""
    sequence: bool = False
    """Whether activations between tensor-parallel blocks are split along the sequence, over the tensor axis."""
    virtual_stages: int | None = None
    """Number of stages per rank. Default: 1, or 2 for schedules that need several (interleaved_1f1b, zb_v, v_half, dualpipe_v)."""
    engine: str = "native"
    """The engine that holds weights, gradients and optimizer state: native (Bagualu's own) | fsdp (torch's fully_shard) |
    deepspeed (DeepSpeed's). docs/guides/memory.md compares them."""
    deepspeed: DeepSpeedConfig = field(default_factory=DeepSpeedConfig)
    schedule: str = "1f1b"
    """Pipeline schedule: gpipe | 1f1b | interleaved_1f1b | zb_h1 | zb_v | v_half | dualpipe_v."""
    balance: Any = "uniform"
    """How layers are split over the stages: uniform; measured or analytic, which minimise the slowest rank's time, computed from
    layer times measured on this device or from their FLOPs; or a list with the number of layers per stage, e.g. [3,3,2], also of
    half layers, e.g. [4.5,3.5]: then a stage ends after the attention of a layer."""
    speeds: Any = None
    """Speed of each pipeline rank, for balance=measured or analytic: measured, or a list relative to the device on which the costs
    are measured, e.g. [1.0,0.5]. Default: equal speeds."""
    shares: Any = None
    """Micro-batches per step of each data rank, so that replicas of unequal speed finish together: measured (from the speeds at the
    start) or a list, e.g. [5,3]. Default: equal shares."""
    memory_bytes: Any = None
    """The most memory, in bytes, that a rank may use for weights, gradients, optimizer state and activations: a number, or a list
    with a number per pipeline rank. Default: no limit."""
    rebalance: RebalanceConfig = field(default_factory=RebalanceConfig)
    zero: int | None = None
    """ZeRO stage: 0 replicates the optimizer state over the data ranks, 1 partitions it among them, 2 partitions gradients too:
    they are reduced after every micro-batch, and each rank keeps its part, 3 partitions weights too: those of a layer are gathered
    when it computes. docs/guides/memory.md compares them. Default: 1, or 3 with engine=fsdp."""
    shard: int | None = None
    """The number of neighbouring data ranks that share one copy of the weights, for engine=fsdp: e.g. those of a node, so that
    weights are only gathered within nodes. Default: all data ranks."""
    bucket_bytes: int = 25 * 2**20
    """Approximate bytes of gradients in a bucket. Most buckets are reduced as soon as they are complete, during the backward pass;
    those that are reduced over a second group too, after it."""

    def validate(self) -> None:
        """Raises RecipeError for settings that are invalid for every world size."""
        for axis in ("data", "tensor", "pipeline", "expert", "context"):
            degree = getattr(self, axis)
            if degree is not None and degree < 1:
                raise RecipeError(f"parallel.{axis}={degree} must be at least 1; leave it out or give parallel.{axis}=1")
        if self.context != 1:
            raise RecipeError(f"parallel.context={self.context} is not supported yet; give parallel.context=1")
        if self.engine not in ENGINES:
            raise RecipeError(f"parallel.engine={self.engine} is unknown; give one of {', '.join(ENGINES)}")
        self.deepspeed.validate()
        if self.engine != "deepspeed":
            refuse_unused("parallel.deepspeed", self.deepspeed, ["config", "offload"], f"parallel.engine={self.engine}")
        placement = placement_of(self.schedule, self.pipeline, self.virtual_stages)
        if self.zero_stage not in ENGINES[self.engine]:
            able = [name for name, stages in ENGINES.items() if self.zero_stage in stages]
            *others, last = sorted(ENGINES[self.engine])
            stages = f"{', '.join(map(str, others))} or {last}" if others else last
            raise RecipeError(f"parallel.engine={self.engine} has no parallel.zero={self.zero}; give parallel.zero={stages}"
                              + (f", or parallel.engine={' or '.join(able)}" if able else ""))  # fmt: skip
        if self.engine == "fsdp":
            self._validate_fsdp()
        elif self.shard is not None:
            raise RecipeError(f"parallel.shard={self.shard} has no effect with parallel.engine={self.engine}; leave it out or give "
                              "parallel.engine=fsdp")  # fmt: skip
        if self.bucket_bytes < 1:
            raise RecipeError(f"parallel.bucket_bytes={self.bucket_bytes} must be positive, e.g. parallel.bucket_bytes=26214400")
        validate_speeds(self.speeds, self.pipeline, self.balance)
        memory_caps(self.memory_bytes, self.pipeline)
        self.rebalance.validate()
        if self.rebalance.every and self.pipeline == 1:
            raise RecipeError(f"parallel.rebalance.every={self.rebalance.every} has no effect with parallel.pipeline=1; "
                              "leave it out or give parallel.pipeline=2")  # fmt: skip
        if self.balance in COMPUTED and placement.stages == 1 and self.memory_bytes is None:
            raise RecipeError(f"parallel.balance={self.balance} has no effect with parallel.pipeline=1, where one stage holds all "
                              "layers; give parallel.balance=uniform or parallel.pipeline=2")  # fmt: skip
        if self.sequence and self.tensor == 1:
            raise RecipeError("parallel.sequence=true needs parallel.tensor of at least 2; drop it or raise parallel.tensor")

    def _validate_fsdp(self) -> None:
        if splits_backward(self.schedule):
            raise RecipeError(f"parallel.schedule={self.schedule} takes the backward pass in two parts, which parallel.engine=fsdp "
                              "cannot; give parallel.schedule=1f1b or parallel.engine=native")  # fmt: skip
        if self.shard is not None and self.shard < 2:
            raise RecipeError(f"parallel.shard={self.shard} must be at least 2 ranks; leave it out, or give parallel.engine=native "
                              "with parallel.zero=0 to hold all weights on every data rank")  # fmt: skip
        refuse_unused("parallel", self, ["bucket_bytes"], "parallel.engine=fsdp")

    @property
    def zero_stage(self) -> int:
        """`zero` with the default resolved."""
        return next(iter(ENGINES[self.engine])) if self.zero is None else self.zero

    @property
    def engine_text(self) -> str:
        """The engine, with its ZeRO stage if it has several, as printed: e.g. "native, ZeRO-1"."""
        return self.engine + (f", ZeRO-{self.zero_stage}" if len(ENGINES[self.engine]) > 1 else "")

    @property
    def rebalance_every(self) -> int:
        """Steps between comparisons that may move layers, with the default resolved; 0: layers never move."""
        if self.pipeline == 1:
            return 0
        if self.rebalance.every is None:
            return 10 if self.balance in COMPUTED else 0
        return self.rebalance.every

    def layout(self, world: int) -> Layout:
        """Returns the layout of `world` ranks, with the data degree inferred if it is left out. Raises RecipeError if the degrees
        do not fit `world` or one another."""
        fixed = self.tensor * self.pipeline * self.context
        product = f"tensor {self.tensor} x pipeline {self.pipeline} x context {self.context}"
        if self.data is None and world % fixed:
            near = max(fixed, world - world % fixed)
            raise RecipeError(f"{world} ranks do not divide into {product} = {fixed}; use {near} ranks or change a degree")
        data = world // fixed if self.data is None else self.data
        if data * fixed != world:
            raise RecipeError(
                f"data {data} x {product} needs {data * fixed} ranks but the world has {world}; "
                f"use {data * fixed} ranks or leave parallel.data out"
            )
        if (data * self.context) % self.expert:
            raise RecipeError(
                f"parallel.expert={self.expert} must divide data x context = {data * self.context}; "
                f"give one of {[n for n in range(1, data * self.context + 1) if data * self.context % n == 0]}"
            )
        layout = Layout(self.pipeline, data, self.context, self.tensor, self.expert, self.shard)
        fits = [n for n in range(2, layout.fold + 1) if layout.fold % n == 0 and (n <= self.expert or n % self.expert == 0)]
        if self.shard is not None and self.shard not in fits:
            multiple = f", and be a multiple of parallel.expert={self.expert} if it is larger" if self.expert > 1 else ""
            raise RecipeError(f"parallel.shard={self.shard} must divide data x context = {layout.fold}{multiple}; " +
                              (f"give one of {fits}" if fits else "leave it out"))  # fmt: skip
        return layout

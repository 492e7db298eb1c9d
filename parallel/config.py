"""What a recipe says about the layout. Free of torch, so that a wrong layout is refused before anything starts."""

from dataclasses import dataclass, field
from typing import Any

from bagualu.comm.checks import require_at_least
from bagualu.comm.errors import RecipeError
from bagualu.parallel.balance.keys import COMPUTED, memory_caps, validate_speeds
from bagualu.parallel.layout import Layout
from bagualu.parallel.pipeline.generate import place

HEAD_CHUNK_TOKENS = 2**10
"""For head and loss (vocabulary.py). Every chunk goes through the whole weight and its gradient, so few tokens would waste time;
more could sum to what float16 does not hold, before any loss scale can help."""


@dataclass
class RebalanceConfig:
    """`parallel.rebalance.*`: layers that move between pipeline ranks while a run goes on."""

    every: int | None = None
    """Steps between looks at what the ranks' passes take; 0: layers stay where they are; left out, 10 with balance=measured or
    analytic, but 0 with train.compile, where a move compiles anew, and 0 else."""
    threshold: float = 0.05
    """Share of a step that a move has to gain."""
    windows: int = 3
    """Looks in a row that have to find the same. After a move it is twice as many for a while, so that layers do not swing."""

    def validate(self) -> None:
        require_at_least(0, "parallel.rebalance", self, "every")
        require_at_least(1, "parallel.rebalance", self, "windows")
        if not 0 < self.threshold < 1:
            raise RecipeError(f"parallel.rebalance.threshold={self.threshold} must lie between 0 and 1, "
                              "e.g. parallel.rebalance.threshold=0.05")  # fmt: skip


@dataclass
class ParallelConfig:
    """`parallel.*` of a recipe: the degree of every axis, and how each mechanism works."""

    data: int | None = None
    """Replicas of the model; left out, it is what the world size leaves over."""
    tensor: int = 1
    """Ranks that share every matrix multiplication."""
    pipeline: int = 1
    """Stages: ranks that each hold a contiguous slice of the layers."""
    expert: int = 1
    """Ranks that share the experts; drawn from the data x context ranks, so it divides their product."""
    context: int = 1
    """Ranks that share a sequence."""
    sequence: bool = False
    """Sequence parallel: between tensor-parallel blocks, split activations along the sequence over the tensor axis."""
    virtual_stages: int | None = None
    """Stages of one rank; left out, as many as the schedule needs: 1, or 2 where it interleaves."""
    engine: str = "native"
    """What holds weights and optimizer: native, Bagualu's own."""
    schedule: str = "1f1b"
    """Pipeline schedule: gpipe | 1f1b | interleaved_1f1b | zb_h1 | zb_v | v_half | dualpipe_v."""
    balance: Any = "uniform"
    """Split of the layers over the stages: uniform; measured or analytic, so that the slowest rank is as quick as can be by what
    layers take on this device or by their FLOPs; or a list with the layers of each stage, e.g. [3,3,2]."""
    speeds: Any = None
    """Speed of each pipeline rank, for balance=measured or analytic: left out, all alike; measured; or a list, 1.0 for the device
    that the costs are measured on, e.g. [1.0,0.5]."""
    shares: Any = None
    """Micro-batches of a step for each data rank, so that replicas of unequal speed are done together: left out, as many for all;
    measured, by their speeds at the start; or a list, e.g. [5,3]."""
    memory_bytes: Any = None
    """What a rank may hold of weights, gradients, optimizer state and activations: one number, or one for each pipeline rank; left
    out, no limit."""
    rebalance: RebalanceConfig = field(default_factory=RebalanceConfig)
    zero: int = 1
    """ZeRO stage: 0 replicates the optimizer state over the data ranks, 1 partitions it."""
    bucket_bytes: int = 25 * 2**20
    """Gradients are reduced in buckets of about this size, overlapped with the backward pass."""

    def validate(self) -> None:
        """Refuse what no world size can make right. Raises RecipeError."""
        for axis in ("data", "tensor", "pipeline", "expert", "context"):
            degree = getattr(self, axis)
            if degree is not None and degree < 1:
                raise RecipeError(f"parallel.{axis}={degree} must be at least 1; leave it out or give parallel.{axis}=1")
        if self.context != 1:
            raise RecipeError(f"parallel.context={self.context} is not supported yet; give parallel.context=1")
        if self.engine != "native":
            raise RecipeError(f"parallel.engine={self.engine} is unknown; give parallel.engine=native")
        placement = place(self.schedule, self.pipeline, self.virtual_stages)
        if self.zero not in (0, 1):
            raise RecipeError(f"parallel.zero={self.zero} is not supported; give parallel.zero=0 or parallel.zero=1")
        if self.bucket_bytes < 1:
            raise RecipeError(f"parallel.bucket_bytes={self.bucket_bytes} must be positive, e.g. parallel.bucket_bytes=26214400")
        validate_speeds(self.speeds, self.pipeline, self.balance)
        memory_caps(self.memory_bytes, self.pipeline)
        self.rebalance.validate()
        if self.rebalance.every and self.pipeline == 1:
            raise RecipeError(f"parallel.rebalance.every={self.rebalance.every} has no effect with parallel.pipeline=1; "
                              "leave it out or give parallel.pipeline=2")  # fmt: skip
        if self.balance in COMPUTED and placement.stages == 1 and self.memory_bytes is None:
            raise RecipeError(f"parallel.balance={self.balance} has no effect with parallel.pipeline=1, whose one stage holds all "
                              "layers; give parallel.balance=uniform or parallel.pipeline=2")  # fmt: skip
        if self.sequence and self.tensor == 1:
            raise RecipeError("parallel.sequence=true needs parallel.tensor of at least 2; drop it or raise parallel.tensor")

    @property
    def rebalance_every(self) -> int:
        """Steps between looks at whether layers should move; 0: they stay."""
        if self.pipeline == 1:
            return 0
        if self.rebalance.every is None:
            return 10 if self.balance in COMPUTED else 0
        return self.rebalance.every

    def layout(self, world: int) -> Layout:
        """The layout of `world` ranks, the data degree inferred where it was left out. Raises RecipeError."""
        fixed = self.tensor * self.pipeline * self.context
        spelled = f"tensor {self.tensor} x pipeline {self.pipeline} x context {self.context}"
        if self.data is None and world % fixed:
            near = max(fixed, world - world % fixed)
            raise RecipeError(f"{world} ranks do not divide into {spelled} = {fixed}; use {near} ranks or change a degree")
        data = world // fixed if self.data is None else self.data
        if data * fixed != world:
            raise RecipeError(
                f"data {data} x {spelled} needs {data * fixed} ranks but the world has {world}; "
                f"use {data * fixed} ranks or leave parallel.data out"
            )
        if (data * self.context) % self.expert:
            raise RecipeError(
                f"parallel.expert={self.expert} must divide data x context = {data * self.context}; "
                f"give one of {[n for n in range(1, data * self.context + 1) if data * self.context % n == 0]}"
            )
        return Layout(self.pipeline, data, self.context, self.tensor, self.expert)

"""The properties of a rank's work on which its time and memory depend, known without torch."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from math import inf
from pathlib import Path
from typing import Any

from bagualu.comm.config import AUTO
from bagualu.parallel.layout import Layout
from bagualu.parallel.pipeline.registry import placement_of
from bagualu.parallel.sharding import ShardingPlan
from bagualu.trainer.data.config import STREAM
from bagualu.trainer.models.decoder.config import ModelConfig
from bagualu.trainer.models.decoder.plan import decoder_plan
from bagualu.trainer.models.decoder.shapes import parameter_shapes
from bagualu.trainer.operators import registry
from bagualu.trainer.operators.config import OperatorsConfig
from bagualu.trainer.operators.usual import tiles_compute, usual_variant
from bagualu.trainer.recipe.config import Recipe

ITEM_BYTES = {"float64": 8, "float32": 4, "bfloat16": 2, "float16": 2}
_MULTIPLIES = {"bfloat16": ("amx_bf16", "avx512_bf16"), "float16": ("amx_fp16", "avx512_fp16")}
"""The instruction sets, as Linux names them, of which a CPU needs one to multiply matrices of a 16-bit dtype."""


@dataclass(frozen=True)
class ModelWork:
    """The properties of a rank's work on which its costs depend."""

    model: ModelConfig
    layout: Layout
    sequence_length: int
    micro_batch: int
    dtype: str
    zero: int = 1
    """ZeRO stage: 0 replicates the optimizer state over the data ranks, 1 partitions it, 2 also partitions most gradients, 3 also
    weights."""
    sequence: bool = False
    """Whether sequence parallelism is on."""
    moments: Mapping[str, int] = field(default_factory=dict)
    """The number of moments that the optimizer keeps of each parameter, by name; two of a parameter that is not in it."""
    half_moments: bool = False
    """Whether moments are bfloat16 rather than in the dtype of master weights."""
    frozen: frozenset[str] = frozenset()
    """The names of parameters that are not trained."""
    engine: str = "native"
    """The engine that divides the state: native, fsdp or deepspeed."""
    offload: str = "none"
    """What DeepSpeed keeps in host memory: none, optimizer or parameters, which includes the optimizer's state."""
    stages: int = 1
    """The number of pipeline stages."""
    ends_apart: bool = False
    """Whether different ranks hold the first and the last stage."""
    on_cpu: bool = True
    """Whether the ranks compute on CPUs, by operations that take more memory for intermediate results than an accelerator's."""
    widens: bool = False
    """Whether matrices of a 16-bit dtype are multiplied in float32 (parallel/precision.py)."""
    documents: bool = False
    """Whether rows hold several documents, between which attention has a mask; then torch's kernel computes it."""
    operators: OperatorsConfig = field(default_factory=OperatorsConfig)
    """The variants by which operators are computed."""

    @cached_property
    def known(self) -> dict[object, Any]:
        """What state.py has computed of this work, since most layers are alike."""
        return {}

    @cached_property
    def plan(self) -> ShardingPlan:
        return decoder_plan(self.model, self.sequence)

    @property
    def tokens(self) -> int:
        return self.micro_batch * self.sequence_length

    @property
    def tokens_between(self) -> int:
        """The number of tokens of a micro-batch that a rank holds between blocks."""
        return self.tokens // (self.layout.tensor if self.sequence else 1)

    @property
    def item_bytes(self) -> int:
        return ITEM_BYTES[self.dtype]

    def moment_bytes(self, name: str) -> int:
        """Returns the bytes of all moments of an element of the parameter `name`; 0 for a frozen one."""
        return 0 if name in self.frozen else self.moments.get(name, 2) * (2 if self.half_moments else self.accurate_bytes)

    @property
    def accurate_bytes(self) -> int:
        """Bytes per element of gradients, master weights, moments and norm statistics, which are at least float32."""
        return max(4, self.item_bytes)

    @property
    def product_bytes(self) -> int:
        """Bytes per element of the operands of matrix products."""
        return self.accurate_bytes if self.widens else self.item_bytes

    @property
    def copies_operands(self) -> bool:
        """Whether linear layers copy their operands to a wider dtype before they multiply them."""
        return self.widens and not self._reads_any_dtype

    @property
    def operand_bytes(self) -> int:
        """Bytes per element of the operands of linear layers that come from outside of attention."""
        return self.accurate_bytes if self.copies_operands else self.item_bytes

    @property
    def copies_gradients(self) -> bool:
        """Whether linear layers round the gradient of a weight before they add it in a wider dtype."""
        return self.on_cpu and self.operand_bytes < self.accurate_bytes and not self._reads_any_dtype

    @property
    def _reads_any_dtype(self) -> bool:
        return self._in_panels or self.in_float8

    @property
    def _in_panels(self) -> bool:
        return self.operators.linear == "panels" and self.dtype in ("bfloat16", "float32")

    @property
    def head_copies_operands(self) -> bool:
        """Whether the head copies its operands to a wider dtype before it multiplies them. Its products are never in float8."""
        return self.widens and not self._in_panels

    @property
    def in_float8(self) -> bool:
        """Whether linear layers multiply in float8."""
        return registry.is_float8(self.operators.linear) and self.dtype == "bfloat16"

    def passes_gradients(self, layer: int) -> bool:
        """Returns whether gradients go back into decoder layer `layer`, -1 for the embedding. They do not if the layer, all layers
        before it and the embedding are frozen, unless it is in a later stage, whose inputs always get a gradient. (Of layers that
        are split unevenly, this holds for those that an even split puts into the first stage.)"""
        return layer >= min(self._first_trained, self.model.layers // self.stages)

    @cached_property
    def _first_trained(self) -> float:
        """The number of the first layer with a trained parameter; -1 if the embedding has one."""
        trained = (name for name in parameter_shapes(self.model) if name not in self.frozen)
        return min((-1 if name.startswith("embedding") else _layer_of(name) for name in trained), default=inf)

    def attends_in_blocks(self, layer: int) -> bool:
        """Returns whether the attention of `layer` is computed in blocks rather than by torch's kernel (operators/attention.py)."""
        return self._attention_variant(layer) == "blocks"

    def attends_in_tiles(self, layer: int) -> bool:
        """Returns whether the attention of `layer` is computed in tiles (operators/tiles.py)."""
        return self._attention_variant(layer) == "tiles"

    def _attention_variant(self, layer: int) -> str:
        if self.documents:
            return registry.DEFAULT_VARIANTS["attention"]
        variant, in_bfloat16 = self.operators.attention, self.dtype == "bfloat16" and not self.widens
        length, keys, slopes = self.sequence_length, self.keys(layer), self.model.positions == "alibi"
        if variant == registry.AUTO:
            return usual_variant("cpu" if self.on_cpu else "cuda", in_bfloat16, length, keys)
        if variant == "tiles" and not tiles_compute(in_bfloat16, self.model.head_width, length, keys, slopes):
            return registry.DEFAULT_VARIANTS["attention"]
        return variant

    def keys(self, layer: int) -> int:
        """Returns the most tokens that a token attends to in `layer`."""
        return min(self.model.window_of(layer) or self.sequence_length, self.sequence_length)


def _layer_of(name: str) -> float:
    """Returns the number of the layer of a parameter; infinity for one outside the layers."""
    return int(name.split(".")[1]) if name.startswith("layers.") else inf


def work_of(recipe: Recipe, layout: Layout) -> ModelWork:
    """Returns the properties of a rank's work, under `recipe` and `layout`, on which its costs depend. Whether a CPU multiplies
    16-bit matrices is that of this machine."""
    parallel, optim, dtype = recipe.parallel, recipe.optim, recipe.train.stored_dtype
    shapes = parameter_shapes(recipe.model)
    placement = placement_of(parallel.schedule, layout.pipeline, parallel.virtual_stages)
    on_cpu = recipe.comm.on_cpu or recipe.comm.backend == AUTO  # until a backend is chosen
    return ModelWork(
        model=recipe.model.padded_over(layout.tensor),
        layout=layout,
        sequence_length=recipe.data.sequence_length,
        micro_batch=recipe.train.micro_batch,
        dtype=dtype,
        zero=parallel.zero_stage,
        sequence=parallel.sequence,
        moments={name: len(optim.moments(optim.treatment(name, len(shape)).optimizer)) for name, shape in shapes.items()},
        half_moments=optim.moments_dtype == "bfloat16",
        frozen=frozenset(filter(recipe.freezes, shapes)) if optim.groups or recipe.model.lora.rank else frozenset(),
        engine=parallel.engine,
        offload=parallel.deepspeed.offload,
        stages=placement.stages,
        ends_apart=placement.rank_of(0) != placement.rank_of(placement.stages - 1),
        on_cpu=on_cpu,
        widens=on_cpu and not cpu_multiplies(dtype),
        documents=recipe.data.packing != STREAM,
        operators=recipe.variants,
    )


def cpu_multiplies(dtype: str, cpuinfo: Path = Path("/proc/cpuinfo")) -> bool:
    """Returns whether this machine's CPU has instructions that multiply matrices of `dtype`."""
    needed = _MULTIPLIES.get(dtype)
    if needed is None:
        return True
    try:
        lines = cpuinfo.read_text(encoding="utf-8").splitlines()
    except OSError:
        return False
    flags = next((line.partition(":")[2].split() for line in lines if line.startswith("flags")), [])
    return any(flag in flags for flag in needed)

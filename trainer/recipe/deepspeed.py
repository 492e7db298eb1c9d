"""What parallel.engine=deepspeed can do, and the configuration that DeepSpeed gets, in DeepSpeed's own keys."""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from bagualu.comm.errors import RecipeError
from bagualu.parallel.config import ENGINES, ParallelConfig
from bagualu.parallel.layout import Layout
from bagualu.parallel.pipeline.registry import placement_of, splits_backward
from bagualu.trainer.optim.config import OptimConfig

VERSION = "0.19.8"
"""The version of DeepSpeed that this version of Bagualu has been tested with; others divide and name their tensors differently."""
_FILE = "parallel.deepspeed.config"
_PASSED = {
    *("comms_logger", "csv_monitor", "dump_state", "flops_profiler", "log_level", "memory_breakdown", "steps_per_print"),
    *("tensorboard", "wall_clock_breakdown"),
    *(f"zero_optimization.{key}" for key in (
        "allgather_bucket_size", "allgather_partitions", "contiguous_gradients", "enable_sanity_checks", "log_trace_cache_warnings",
        "offload_optimizer.pin_memory", "offload_param.pin_memory", "overlap_comm", "reduce_bucket_size", "reduce_scatter",
        "use_multi_rank_bucket_allreduce", "stage3_allgather_sequential", "stage3_max_live_parameters", "stage3_max_reuse_distance",
        "stage3_model_persistence_threshold", "stage3_module_granularity_threshold", "stage3_param_persistence_threshold",
        "stage3_prefetch_bucket_size", "stage3_use_all_reduce_for_fetch_params",
    )),
}  # fmt: skip
"""DeepSpeed's keys and sections that a file may hold whatever the recipe says: they change how DeepSpeed works, not its results."""
_OWN_KEYS = {
    "activation_checkpointing": "train.recompute", "amp": "train.dtype", "torch_autocast": "train.dtype", "wandb": "log.wandb",
    "checkpoint": "checkpoint.*", "compile": "train.compile", "expert_parallel": "parallel.expert", "pipeline": "parallel.pipeline",
    "sequence_parallel_size": "parallel.context", "tensor_parallel": "parallel.tensor",
}  # fmt: skip
"""The recipe's key for what a section of DeepSpeed's configuration does."""
_OPTIMIZERS = {"adamw": ("adamw", "adam"), "lion": ("lion",), "sgd": ("sgd",)}
"""DeepSpeed's names, in small letters, of each optimizer. Its Adam is AdamW, unless adam_w_mode is false."""


def require_deepspeed() -> None:
    """Raises RecipeError unless the version of DeepSpeed that parallel.engine=deepspeed needs is installed. Does not import it."""
    fix = f"type pip install 'deepspeed=={VERSION}', or give parallel.engine=native"
    try:
        found = version("deepspeed")
    except PackageNotFoundError as error:
        raise RecipeError(f"parallel.engine=deepspeed needs DeepSpeed, which is not installed; {fix}") from error
    if found.partition("+")[0] != VERSION:
        raise RecipeError(f"parallel.engine=deepspeed works with DeepSpeed {VERSION}, not with {found}, which is installed; {fix}")


@dataclass(frozen=True)
class DeepSpeedTerms:
    """What of a recipe DeepSpeed has to do with."""

    parallel: ParallelConfig
    optim: OptimConfig
    layout: Layout
    dtype: str
    compiles: bool
    simulated: bool
    """Whether the ranks are threads of one process."""
    global_batch: int
    micro_batch: int
    accumulation: int | None
    """The number of micro-batches of a data rank in a step; None if ranks differ in it, or it may change between starts."""
    elements: int
    """The number of elements of the model's parameters."""

    @property
    def stage(self) -> int:
        return self.parallel.zero_stage

    @property
    def half(self) -> bool:
        return self.dtype == "bfloat16"

    @property
    def offloads(self) -> tuple[str, str]:
        """DeepSpeed's names of the devices that hold the optimizer's state and the parameters."""
        offload = self.parallel.deepspeed.offload
        return "none" if offload == "none" else "cpu", "cpu" if offload == "parameters" else "none"

    @property
    def in_order_to_add(self) -> dict[str, bool]:
        """The keys that DeepSpeed needs to add gradients as it should: in ZeRO-1 after the last backward pass of a step, and for
        16-bit weights without rounding the gradients of a micro-batch to 16 bits."""
        if self.stage == 1:
            return {"overlap_comm": False, "contiguous_gradients": False}
        return {"contiguous_gradients": False} if self.stage == 2 and self.half else {}

    def validate(self) -> None:
        """Raises RecipeError for what parallel.engine=deepspeed cannot do, and for a file that contradicts the recipe."""
        parallel, layout, stage = self.parallel, self.layout, self.stage
        engine = "parallel.engine=deepspeed"
        able = [name for name, stages in ENGINES.items() if name != "deepspeed" and (parallel.zero is None or stage in stages)]
        instead = f"parallel.engine={' or '.join(able)}"
        if self.simulated:
            raise RecipeError(f"{engine} needs a process for each rank, and comm.backend=simulated has threads; give "
                              "comm.backend=gloo or parallel.engine=native")  # fmt: skip
        if self.dtype == "float64":
            raise RecipeError(f"train.dtype=float64 does not go with {engine}, which updates weights in float32; give {instead} or "
                              "train.dtype=float32")  # fmt: skip
        if self.dtype == "float16":
            raise RecipeError(f"train.dtype=float16 does not go with {engine}, whose loss scale is not the one that the guard and "
                              f"checkpoints know; give train.dtype=bfloat16 or {instead}")  # fmt: skip
        if self.compiles:
            raise RecipeError(f"train.compile=true does not go with {engine}, which changes parameters that compiled layers hold; "
                              f"give train.compile=false or {instead}")  # fmt: skip
        if self.optim.name == "muon":
            raise RecipeError(f"optim.name=muon does not go with {engine}, which updates parts of matrices one after the other; "
                              f"give optim.name=adamw or {instead}")  # fmt: skip
        if splits_backward(parallel.schedule):
            raise RecipeError(f"parallel.schedule={parallel.schedule} takes the backward pass in two parts, which {engine} cannot; "
                              "give parallel.schedule=1f1b or parallel.engine=native")  # fmt: skip
        if stage >= 2 and layout.pipeline > 1:
            raise RecipeError(f"parallel.zero={stage} does not go with parallel.pipeline={layout.pipeline} under {engine}, which "
                              f"reduces in every backward pass; give parallel.zero=1 or {instead}")  # fmt: skip
        if stage >= 2 and (parallel.schedule != "1f1b" or placement_of(parallel.schedule, 1, parallel.virtual_stages).stages > 1):
            raise RecipeError(f"parallel.schedule={parallel.schedule} with parallel.zero={stage} does not go with {engine}, "
                              "whose backward passes must follow their forward passes; give parallel.schedule=1f1b or "
                              f"{instead}")  # fmt: skip
        if stage == 3 and layout.expert > 1:
            raise RecipeError(f"parallel.zero=3 does not go with parallel.expert={layout.expert} under {engine}, which divides all "
                              f"parameters among the same ranks; give parallel.zero=2, parallel.expert=1 or {instead}")  # fmt: skip
        if parallel.deepspeed.offload == "parameters" and stage < 3:
            raise RecipeError(f"parallel.deepspeed.offload=parameters needs parallel.zero=3: with parallel.zero={stage} all ranks "
                              "keep all weights; give parallel.zero=3 or parallel.deepspeed.offload=optimizer")  # fmt: skip
        self._from_file()

    def library_config(self) -> dict[str, Any]:
        """Returns the configuration with which DeepSpeed starts: that of parallel.deepspeed.config, with what the recipe decides in
        its place. Raises RecipeError as `validate` does."""
        config = self._from_file()
        zero: dict[str, Any] = {
            "reduce_bucket_size": max(1, self.parallel.bucket_bytes // 4),
            **self.in_order_to_add,
            **config.get("zero_optimization", {}),
            "stage": self.stage,
            "sub_group_size": 10**15,  # so that a group of parameters is one flat tensor
            "memory_efficient_linear": False,  # it would replace torch.nn.functional.linear in the whole process
            "override_module_apply": False,
        }
        for section, device in zip(("offload_optimizer", "offload_param"), self.offloads, strict=True):
            zero[section] = {"pin_memory": False, **zero.get(section, {}), "device": device}
        # The guard has agreed on the norm before DeepSpeed updates, so DeepSpeed leaves it out where it can.
        zero["compute_grad_norm"] = self.stage == 3 or self.offloads[0] == "cpu" or (self.stage == 1 and self.half)
        if self.half:
            config["bf16"] = {"enabled": True, "immediate_grad_update": True, "check_grad_overflow": False}
            config["data_types"] = {"grad_accum_dtype": "fp32"}
        return {
            **config,
            "zero_optimization": zero,
            "communication_data_type": "fp32",
            "train_micro_batch_size_per_gpu": self.micro_batch,
            "gradient_accumulation_steps": 1,  # the engine says which pass of a step is the last, and gradients must not be divided
            "gradient_clipping": 0.0,  # the update is clipped by the norm of the whole model, on which all ranks have agreed
            "zero_allow_untested_optimizer": True,
            "zero_force_ds_cpu_optimizer": False,
        }

    def _from_file(self) -> dict[str, Any]:
        """Returns the keys of parallel.deepspeed.config that DeepSpeed is to have; none without a file. Raises RecipeError."""
        name = self.parallel.deepspeed.config
        if name is None:
            return {}
        try:
            whole = json.loads(Path(name).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise RecipeError(
                f"{_FILE}={name} cannot be read ({error}); give a file of DeepSpeed's configuration in JSON"
            ) from error
        if not isinstance(whole, dict):
            raise RecipeError(f"{_FILE}={name} holds no JSON object; give a file of DeepSpeed's configuration in JSON")
        decided, differ, passed = self._decided(), [], {}
        for key, value in _flat(whole):
            if key in decided and value != "auto" and not _same(value, decided[key][0]):
                differ.append(f"{key}={json.dumps(value)} but {decided[key][1]}")
            if any(key == one or key.startswith(f"{one}.") for one in _PASSED):
                if value != "auto":
                    passed[key] = value
            elif key not in decided and not key.startswith("scheduler.params."):  # scheduler.type stands for the whole section
                raise RecipeError(f"{_FILE}={name}: {_unknown(key, decided)}")
        if differ:
            raise RecipeError(f"{_FILE}={name} contradicts the recipe: {'; '.join(differ)}; make them agree, or leave "
                              "these keys of the file out")  # fmt: skip
        return _nested(passed)

    def _decided(self) -> dict[str, tuple[object, str]]:
        """Returns what the recipe decides of DeepSpeed's configuration: for each key, its value, and the recipe's key and value."""
        optim, parallel = self.optim, self.parallel
        batch, dtype, name = f"data.global_batch={self.global_batch}", f"train.dtype={self.dtype}", f"optim.name={optim.name}"
        zero, offload = f"parallel.zero={self.stage}", f"parallel.deepspeed.offload={parallel.deepspeed.offload}"
        in_float32 = "gradients are added in float32"
        each = f"{batch} with train.micro_batch={self.micro_batch} is {self.accumulation} on each of {self.layout.data} data ranks"
        if self.accumulation is None:
            each = "the number is not the same for all data ranks (parallel.shares) or all starts (restart.elastic)"
        same = {"lr": "lr", "betas": "betas", "eps": "epsilon", "weight_decay": "weight_decay", "momentum": "momentum"}
        return {
            "train_batch_size": (self.global_batch, batch),
            "train_micro_batch_size_per_gpu": (self.micro_batch, f"train.micro_batch={self.micro_batch}"),
            "gradient_accumulation_steps": (self.accumulation, each),
            "gradient_clipping": (optim.clip_norm, f"optim.clip_norm={optim.clip_norm}"),
            "gradient_allreduce_op": ("mean", "the engine knows its gradients as means"),
            "communication_data_type": ("fp32", in_float32),
            "data_types.grad_accum_dtype": ("fp32", in_float32),
            "fp16.enabled": (False, dtype),
            "bf16.enabled": (self.half, dtype),
            "bf16.check_grad_overflow": (False, "the guard decides about gradients"),
            "bf16.immediate_grad_update": (True, in_float32),
            "optimizer.type": (_OPTIMIZERS[optim.name], name),
            **{f"optimizer.params.{key}": (getattr(optim, own), f"optim.{own}={getattr(optim, own)}") for key, own in same.items()},
            "optimizer.params.adam_w_mode": (True, name),
            "optimizer.params.torch_adam": (True, name),
            "scheduler.type": (None, f"optim.schedule={optim.schedule}"),
            "zero_optimization.stage": (self.stage, zero),
            "zero_optimization.offload_optimizer.device": (self.offloads[0], offload),
            "zero_optimization.offload_param.device": (self.offloads[1], offload),
            "zero_optimization.sub_group_size": (_AtLeast(self.elements), f"the model has {self.elements} parameters"),
            **{f"zero_optimization.{key}": (value, f"{zero} with {dtype}") for key, value in self.in_order_to_add.items()},
        }


class _AtLeast(int):
    """A number that any number of at least this size agrees with."""


def _same(value: object, expected: object) -> bool:
    if isinstance(expected, _AtLeast):
        return isinstance(value, int | float) and value >= expected
    if isinstance(expected, tuple):
        return isinstance(value, str) and value.lower() in expected
    return value == expected and isinstance(value, bool) == isinstance(expected, bool)


def _unknown(key: str, agreed: Mapping[str, object]) -> str:
    """Returns why a file may not hold `key`, and what to do."""
    section = key.partition(".")[0]
    if section in _OWN_KEYS:
        return f"{key} is decided by {_OWN_KEYS[section]} of the recipe; leave {section} out of the file"
    near = get_close_matches(key, [*agreed, *_PASSED], 1)
    return f"{key} cannot be used here; " + (f"did you mean {near[0]}? " if near else "") + "leave it out of the file"


def _flat(section: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yields (key with its sections, value) for every value of a configuration that is not a section."""
    for key, value in section.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


def _nested(flat: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the configuration of which `flat` has the values, as `_flat` yields them."""
    nested: dict[str, Any] = {}
    for key, value in flat.items():
        *path, last = key.split(".")
        section = nested
        for one in path:
            section = section.setdefault(one, {})
        section[last] = value
    return nested

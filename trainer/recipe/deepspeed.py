"""What parallel.engine=deepspeed can do, and the configuration that DeepSpeed gets, in DeepSpeed's own keys."""

from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from bagualu.comm.errors import RecipeError
from bagualu.parallel.config import ENGINES, ParallelConfig
from bagualu.parallel.layout import Layout
from bagualu.parallel.pipeline.registry import placement_of, splits_backward
from bagualu.trainer.optim.config import OptimConfig
from bagualu.trainer.recipe.deepspeed_file import Decision, DeepSpeedFile, number, text_in

VERSION = "0.19.8"
"""The version of DeepSpeed that this version of Bagualu has been tested with; others divide and name their tensors differently."""
_OPTIMIZERS = {"adamw": ("adamw", "adam"), "lion": ("lion",), "sgd": ("sgd",)}
"""DeepSpeed's names, in small letters, of each optimizer. Its Adam is AdamW, unless adam_w_mode is false."""
_DEFAULTS: dict[str, dict[str, Any]] = {
    "adamw": {"lr": 1e-3, "betas": [0.9, 0.999], "eps": 1e-8, "weight_decay": 0.0},
    "lion": {"lr": 1e-3, "betas": [0.9, 0.999], "weight_decay": 0.0},
    "sgd": {"lr": 1e-3, "momentum": 0.0, "weight_decay": 0.0},
}
"""The parameters of each optimizer, with the defaults that they have in DeepSpeed."""


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
        file = self._file()
        return {} if file is None else file.passed(self._decided(file))

    def remarks(self) -> list[str]:
        """Returns the lines to print before a run about the file of parallel.deepspeed.config. Raises RecipeError if it cannot be
        read."""
        file = self._file()
        line = None if file is None else file.replaced_defaults(self._decided(file))
        return [] if line is None else [line]

    def _file(self) -> DeepSpeedFile | None:
        name = self.parallel.deepspeed.config
        return None if name is None else DeepSpeedFile.read(name)

    def _decided(self, file: DeepSpeedFile) -> dict[str, Decision]:
        """Returns what the recipe decides of DeepSpeed's configuration, by DeepSpeed's keys."""
        optim, parallel = self.optim, self.parallel
        batch, dtype = f"data.global_batch={self.global_batch}", f"train.dtype={self.dtype}"
        zero, offload = f"parallel.zero={self.stage}", f"parallel.deepspeed.offload={parallel.deepspeed.offload}"
        in_float32 = "gradients are added in float32"
        without = f"{zero} with {dtype} adds gradients in float32 only without it (leave it out)"
        each = f"{batch} with train.micro_batch={self.micro_batch} is {self.accumulation} on each of {self.layout.data} data ranks"
        if self.accumulation is None:
            each = "the number is not the same for all data ranks (parallel.shares) or all starts (restart.elastic)"
        return {
            "train_batch_size": Decision(self.global_batch, batch),
            "train_micro_batch_size_per_gpu": Decision(self.micro_batch, f"train.micro_batch={self.micro_batch}"),
            "gradient_accumulation_steps": Decision(self.accumulation, each),
            "gradient_clipping": Decision(optim.clip_norm, f"optim.clip_norm={optim.clip_norm}", 1.0),
            "gradient_allreduce_op": Decision("mean", "the engine knows its gradients as means"),
            "communication_data_type": Decision("fp32", in_float32),
            "data_types.grad_accum_dtype": Decision("fp32", in_float32),
            "fp16.enabled": Decision(False, dtype),
            "bf16.enabled": Decision(self.half, dtype),
            "bf16.check_grad_overflow": Decision(False, "the guard decides about gradients"),
            "bf16.immediate_grad_update": Decision(True, in_float32),
            **self._decided_optimizer(file),
            "zero_optimization.stage": Decision(self.stage, zero),
            "zero_optimization.offload_optimizer.device": Decision(self.offloads[0], offload),
            "zero_optimization.offload_param.device": Decision(self.offloads[1], offload),
            "zero_optimization.sub_group_size": Decision(number(self.elements), f"the model has {self.elements} parameters"),
            **{f"zero_optimization.{key}": Decision(value, without) for key, value in self.in_order_to_add.items()},
        }

    def _decided_optimizer(self, file: DeepSpeedFile) -> dict[str, Decision]:
        optim = self.optim
        name, defaults = f"optim.name={optim.name}", dict(_DEFAULTS[optim.name])
        if file.values.get("optimizer.params.torch_adam"):
            defaults["weight_decay"] = 0.01  # torch's own default
        given = {
            "lr": ("lr", optim.lr), "betas": ("betas", optim.betas), "eps": ("epsilon", optim.epsilon),
            "momentum": ("momentum", optim.momentum_kept), "weight_decay": ("weight_decay", optim.weight_decay),
        }  # fmt: skip
        constant = optim.schedule == "constant" and not optim.warmup_steps
        return {
            "optimizer.type": Decision(text_in(*_OPTIMIZERS[optim.name], capitals=True), name),
            **{
                f"optimizer.params.{key}": Decision(value, f"optim.{own}={value}", defaults[key])
                if key in defaults
                else Decision(None, f"{name} has none")
                for key, (own, value) in given.items()
            },
            "optimizer.params.adam_w_mode": Decision(True, name),
            "optimizer.params.torch_adam": Decision(True, name),
            "scheduler.type": Decision(None, f"optim.schedule={optim.schedule}", None if constant else "none"),
        }

"""The plain model under torch's and DeepSpeed's own parallelism, used directly. Each builder makes one Step."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from contest.entry import COMPILED, PLAIN
from contest.loop import CLIP_NORM, PADDED_ROWS, Step, adamw, build_model, optimizer_for, plain, stepper
from contest.model import Attention, Linear
from contest.model_parallel import pipeline_parallel, tensor_parallel
from contest.shapes import Shape


def ddp(shape: Shape, precision: str, compiled: bool) -> Step:
    """torch DistributedDataParallel; gradients are reduced in the weights' dtype or in float32, in views of its buckets."""
    model = build_model(shape, precision)
    wrapped = nn.parallel.DistributedDataParallel(model, gradient_as_bucket_view=True)
    if precision.endswith("sum32"):
        wrapped.register_comm_hook(None, _mean_in_float32)
    return stepper(torch.compile(wrapped) if compiled else wrapped, optimizer_for(model, precision), precision)


def _mean_in_float32(state: None, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
    gradients = bucket.buffer()
    wide = gradients.float().div_(dist.get_world_size())
    reduced = dist.all_reduce(wide, async_op=True).get_future()
    return reduced.then(lambda done: gradients.copy_(done.value()[0]))


def fsdp(shape: Shape, precision: str, compiled: bool) -> Step:
    """torch FSDP2: float32 shards are the master weights, gathered as bfloat16 layer by layer, and compiled likewise, if at all."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    model = build_model(shape, "f32")
    if precision.startswith("bf16"):
        for module in model.modules():
            if isinstance(module, Linear | Attention):
                module.wide = precision.startswith("bf16wide")
        policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32, cast_forward_inputs=False)
    else:
        policy = MixedPrecisionPolicy()
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for layer in model.layers:
        if compiled:
            layer.compile()
        fully_shard(layer, mesh=mesh, mp_policy=policy)
    fully_shard(model, mesh=mesh, mp_policy=policy)
    optimizer = adamw(model.parameters())

    def step(inputs: Tensor, labels: Tensor) -> float:
        loss = model(inputs, labels)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), CLIP_NORM)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return float(loss.detach())

    return step


def deepspeed_zero(stage: int, shape: Shape, precision: str) -> Step:
    """DeepSpeed ZeRO with its own bfloat16 engine around torch's AdamW."""
    import deepspeed

    model = build_model(shape, precision)
    config: dict[str, Any] = {
        "train_batch_size": shape.batch,
        "train_micro_batch_size_per_gpu": shape.batch // dist.get_world_size(),
        "gradient_clipping": CLIP_NORM,
        "zero_optimization": {"stage": stage},
        "bf16": {"enabled": precision.startswith("bf16")},
        "zero_allow_untested_optimizer": True,
        "steps_per_print": 10**9,
    }
    if precision.endswith("sum32"):
        config |= {"data_types": {"grad_accum_dtype": "fp32"}, "communication_data_type": "fp32"}
    engine = deepspeed.initialize(model=model, optimizer=adamw(model.parameters()), config=config)[0]

    def step(inputs: Tensor, labels: Tensor) -> float:
        loss = engine(inputs, labels)
        engine.backward(loss)
        engine.step()
        return float(loss.detach())

    return step


BUILDERS: dict[str, Callable[..., Step]] = {
    "ddp": ddp, "fsdp": fsdp, "deepspeed": partial(deepspeed_zero, 1), "deepspeed2": partial(deepspeed_zero, 2),
    "deepspeed3": partial(deepspeed_zero, 3), "torchtp": tensor_parallel, "torchpp": partial(pipeline_parallel, 1),
    "torchpp2": partial(pipeline_parallel, 2),
}  # fmt: skip
SHARE_THE_MODEL = ("torchtp", "torchpp", "torchpp2")
"""Every process sees the whole batch; under the others each has its part of it."""


def build(framework: str, shape: Shape, precision: str, compiled: bool, device: str) -> Step:
    """The Step of a contestant in this process; torch.distributed is set up already where the framework needs it."""
    if framework in PLAIN:
        return plain(shape, precision, compiled, device, PADDED_ROWS if framework == "plainpad" else 1)
    builder = BUILDERS[framework]
    return builder(shape, precision, compiled) if framework in COMPILED else builder(shape, precision)

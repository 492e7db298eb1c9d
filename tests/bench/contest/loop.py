"""One process' share of an optimizer step, for the plain loop: precision modes, master weights, clipping."""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

from contest.entry import PRECISIONS
from contest.model import Decoder
from contest.shapes import Shape

Step = Callable[[Tensor, Tensor], float]
"""One whole optimizer step on inputs and labels [B, S]: forward, backward, clip, update. Returns the loss."""

CLIP_NORM = 1.0


PADDED_ROWS = 64
"""What plainpad pads the rows of an expert to a multiple of."""


def build_model(shape: Shape, precision: str, seed: int = 0, device: str = "cpu", rows: int = 1) -> Decoder:
    """The plain decoder with the weights of `seed`, stored as `precision` (one of PRECISIONS) says; `rows` as for Mixture."""
    if precision not in PRECISIONS:
        raise ValueError(f"precision {precision} is unknown; give one of {', '.join(PRECISIONS)}")
    torch.manual_seed(seed)
    with torch.device(device):
        model = Decoder(shape, wide=precision.startswith("bf16wide"), rows=rows)
    return cast_weights(model, torch.bfloat16) if precision.startswith("bf16") else model


def cast_weights(model: Decoder, dtype: torch.dtype) -> Decoder:
    """Cast parameters only: the rotary tables stay float32."""
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    return model


def adamw(parameters: Iterable[Tensor]) -> torch.optim.AdamW:
    """Torch's fused AdamW; tensors of one dimension (norms) are not decayed."""
    listed = list(parameters)
    groups = [
        {"params": [p for p in listed if p.dim() > 1], "weight_decay": 0.1},
        {"params": [p for p in listed if p.dim() <= 1], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=1e-3, betas=(0.9, 0.95), fused=True)


class MasterAdamW:
    """AdamW on float32 copies of bfloat16 parameters, which are the copies rounded."""

    def __init__(self, parameters: Iterable[nn.Parameter]) -> None:
        self.parameters = list(parameters)
        self.masters = [p.detach().float() for p in self.parameters]
        for master in self.masters:
            master.grad = torch.empty_like(master)
        self.inner = adamw(self.masters)

    @torch.no_grad()
    def step(self) -> None:
        """Widen the gradients, clip by their global norm, update, round back; the parameters' gradients are dropped."""
        for parameter, master in zip(self.parameters, self.masters, strict=True):
            assert parameter.grad is not None
            assert master.grad is not None
            master.grad.copy_(parameter.grad)
            parameter.grad = None
        nn.utils.clip_grad_norm_(self.masters, CLIP_NORM)
        self.inner.step()
        for parameter, master in zip(self.parameters, self.masters, strict=True):
            parameter.copy_(master)


class PlainAdamW:
    """AdamW on float32 parameters, clipped; the counterpart of MasterAdamW for autocast and f32."""

    def __init__(self, parameters: Iterable[nn.Parameter]) -> None:
        self.parameters = list(parameters)
        self.inner = adamw(self.parameters)

    def step(self) -> None:
        nn.utils.clip_grad_norm_(self.parameters, CLIP_NORM)
        self.inner.step()
        self.inner.zero_grad(set_to_none=True)


def optimizer_for(model: nn.Module, precision: str) -> MasterAdamW | PlainAdamW:
    """The optimizer that `precision` calls for."""
    return (MasterAdamW if precision.startswith("bf16") else PlainAdamW)(model.parameters())


def stepper(model: Callable[[Tensor, Tensor], Tensor], optimizer: MasterAdamW | PlainAdamW, precision: str) -> Step:
    """The loop's body. `model` may be wrapped (compiled, DistributedDataParallel)."""

    def step(inputs: Tensor, labels: Tensor) -> float:
        with torch.autocast(inputs.device.type, dtype=torch.bfloat16, enabled=precision == "autocast"):
            loss = model(inputs, labels)
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        return float(loss.detach())

    return step


def plain(shape: Shape, precision: str, compiled: bool, device: str = "cpu", rows: int = 1) -> Step:
    """The plain loop in one process, eager or with the whole model compiled; `rows` as for Mixture."""
    model = build_model(shape, precision, device=device, rows=rows)
    optimizer = optimizer_for(model, precision)
    return stepper(torch.compile(model) if compiled else model, optimizer, precision)

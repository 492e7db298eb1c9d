"""Layers that sleep for as long as they would compute: pipelines of more ranks than this machine has cores.

Everything around the layers is real: schedule, runtime, messages, the measuring of costs, the watch, and what moves.
"""

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch

from bagualu.comm.monitor import Monitor
from bagualu.parallel.data.reducer import gradient_sink
from bagualu.parallel.pipeline.layer_slice import LayerPart
from bagualu.trainer.models.decoder.model import Head, Layer
from bagualu.trainer.models.decoder.moe import MixtureOfExperts


@dataclass(frozen=True)
class Slow:
    """From `step` (from 1) on, `rank` sleeps `factor` times as long."""

    rank: int
    step: int
    factor: float


@dataclass
class Sleepers:
    """How long each kind of layer sleeps in each of forward, input-gradient and weight-gradient pass."""

    dense_seconds: float
    mixture_seconds: float
    head_seconds: float
    slow: Slow | None = None
    monitors: dict[str, Monitor] = field(default_factory=dict)
    """By name of the rank's thread: who knows the step."""

    def join(self, monitor: Monitor) -> None:
        """A rank begins, on its own thread."""
        self.monitors[threading.current_thread().name] = monitor

    @contextmanager
    def installed(self) -> Iterator[None]:
        """Inside, layers sleep."""
        layer, head = Layer.forward, Head.forward
        Layer.forward, Head.forward = self._layer(), self._head(head)  # type: ignore[method-assign]
        try:
            yield
        finally:
            Layer.forward, Head.forward = layer, head  # type: ignore[method-assign]

    def sleep(self, seconds: float) -> None:
        name, slow = threading.current_thread().name, self.slow
        if slow and name == f"rank-{slow.rank}" and self.monitors[name].step >= slow.step:
            seconds *= slow.factor
        time.sleep(seconds)

    def _layer(self) -> Any:
        def forward(
            layer: Layer, x: torch.Tensor, mask: torch.Tensor | None = None, part: LayerPart | None = None
        ) -> tuple[torch.Tensor, None, None]:
            part, attention = part or layer.part, self.dense_seconds / 2
            if part is LayerPart.ATTENTION:
                return _Sleep.apply(x, layer.attention.query.weight, partial(self.sleep, attention)), None, None
            seconds = self.mixture_seconds if isinstance(layer.feed_forward, MixtureOfExperts) else self.dense_seconds
            seconds -= attention if part is LayerPart.FEED_FORWARD else 0.0
            weight = next(layer.feed_forward.parameters())
            return _Sleep.apply(x, weight, partial(self.sleep, seconds)), None, None

        return forward

    def _head(self, real: Any) -> Any:
        def forward(head: Head, x: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
            loss: torch.Tensor = real(head, _Sleep.apply(x, None, partial(self.sleep, self.head_seconds)), labels)
            return loss

        return forward


class _Sleep(torch.autograd.Function):
    """The input as it is. `weight`: whose gradient is put off as that of a linear layer is; None: cannot be put off."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor | None, sleep: Any) -> torch.Tensor:
        sink = None if weight is None else gradient_sink(weight)
        ctx.sleep, ctx.reducer = sleep, sink.reducer if sink else None
        sleep()
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        ctx.sleep()
        if ctx.reducer is None or ctx.reducer.put_off is None:
            ctx.sleep()
        else:
            ctx.reducer.put_off.append(ctx.sleep)
        return grads[0], None, None

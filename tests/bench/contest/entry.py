"""What a contestant is called, and what the name says. Free of torch."""

import re
from dataclasses import dataclass

from bagualu.parallel.config import ENGINES
from bagualu.parallel.pipeline.registry import SCHEDULES

PLAIN = ("plain", "plainpad")
"""Loops in one process; plainpad pads the rows of experts to a multiple of 64."""
BASELINES = (*PLAIN, "ddp", "fsdp", "deepspeed", "deepspeed2", "deepspeed3", "torchtp", "torchpp", "torchpp2")
"""fsdp is ZeRO-3; deepspeed is ZeRO-1, or the stage that follows its name. torchpp has one sequence in a micro-batch,
torchpp2 has two."""
COMPILED = (*PLAIN, "ddp", "fsdp", "bagualu")
"""Programs that are measured compiled too."""
AXES = ("data", "tensor", "pipeline", "expert")
"""pipeline: with the recipe's own schedule."""
ENGINE_STAGES = {f"{engine}{stage}": (engine, stage) for engine, stages in ENGINES.items() for stage in stages}
"""Data ranks of Bagualu with this engine and ZeRO stage."""
PRECISIONS = ("bf16", "bf16wide", "bf16sum32", "bf16widesum32", "autocast", "f32")
"""bf16: bfloat16 weights and arithmetic. bf16wide: bfloat16 weights, but matmul and attention in float32. autocast:
float32 weights under torch.autocast. f32: float32 throughout. All with bfloat16 weights keep float32 master weights. DDP and
DeepSpeed also add and send gradients in bfloat16, with sum32 in float32, as FSDP2 and Bagualu always do."""
GRAMMAR = "PROGRAM[-VARIANT][-compiled][@PROCESSESxTHREADS]"
NAME = re.compile(
    r"(?P<program>[a-z]+\d?)(-(?P<variant>(?!compiled)[a-z0-9_]+))?(?P<compiled>-compiled)?"
    r"(@(?P<processes>[1-9]\d*)x(?P<threads>[1-9]\d*))?"
)


@dataclass(frozen=True)
class Entry:
    """One contestant: a program, its variant, and the processes x threads that it gets."""

    program: str
    """One of BASELINES, or bagualu."""
    variant: str
    """Baselines: the precision. Bagualu: the axis that more than one process is spent on, the schedule of a pipeline, or engine and
    ZeRO stage of data ranks."""
    compiled: bool
    processes: int
    threads: int

    @property
    def axis(self) -> str:
        """What Bagualu spends more than one process on."""
        return "pipeline" if self.variant in SCHEDULES else "data" if self.variant in ENGINE_STAGES else self.variant

    @property
    def name(self) -> str:
        variant = f"-{self.variant}" if self.variant else ""
        return f"{self.program}{variant}{'-compiled' if self.compiled else ''}@{self.processes}x{self.threads}"


def parse(text: str, cores: int) -> Entry:
    """An entry from its name (GRAMMAR), e.g. plain-bf16, plain-f32-compiled, ddp-bf16@2x1, bagualu-tensor, bagualu-zb_h1.

    Left out: precision bf16; one process for plain and for bagualu without an axis, two otherwise; threads that share
    out `cores`. Raises ValueError with what is allowed.
    """
    match = NAME.fullmatch(text)
    if not match:
        raise ValueError(f"contestant {text!r} is not {GRAMMAR}, e.g. plain-bf16@1x2")
    program, variant, compiled = match["program"], match["variant"] or "", bool(match["compiled"])
    allowed: tuple[str, ...]
    if program in BASELINES:
        sends = program == "ddp" or program.startswith("deepspeed")
        allowed = tuple(name for name in PRECISIONS if sends or not name.endswith("sum32"))
        variant = variant or "bf16"
    elif program == "bagualu":
        allowed = ("", *AXES, *SCHEDULES, *ENGINE_STAGES)
    else:
        raise ValueError(f"contestant {text!r}: no such program; give one of {', '.join((*BASELINES, 'bagualu'))}")
    if variant not in allowed:
        raise ValueError(f"contestant {text!r}: no variant {variant!r}; give one of {', '.join(filter(None, allowed))}")
    if compiled and program not in COMPILED:
        raise ValueError(f"contestant {text!r}: only {', '.join(COMPILED)} are measured compiled; drop -compiled")
    alone = program in PLAIN or (program == "bagualu" and not variant)
    processes = int(match["processes"] or (1 if alone else 2))
    if alone and processes != 1:
        raise ValueError(f"contestant {text!r}: several processes must share the work, e.g. ddp or bagualu-data")
    return Entry(program, variant, compiled, processes, int(match["threads"] or max(1, cores // processes)))

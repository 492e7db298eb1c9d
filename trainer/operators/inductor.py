"""Has torch's compiler, Inductor, generate code. Importing this module loads the compiler: two seconds, 120 MB."""

import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from types import BuiltinFunctionType
from typing import Any

import torch
import torch._inductor.config
from torch._dynamo.source import ConstantSource
from torch._guards import TracingContext, tracing
from torch._inductor.compile_fx import compile_fx_inner
from torch._inductor.decomposition import select_decomp_table
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv

from bagualu.trainer.operators.form import Form
from bagualu.trainer.operators.kept_code import Code, Generated

torch._inductor.config.cpp.vec_isa_ok = True  # that the CPU has AVX-512 is else tried out in each process: a second


def compile_function(function: Callable[..., Any], form: Form, sizes: Mapping[str, int]) -> Generated:
    """Returns code for a function of arguments of a form. `sizes` are those of the first call where they vary; they decide only how
    work is divided. Raises what the compiler raises, of many types."""
    mode = FakeTensorMode(shape_env=(environment := ShapeEnv()))
    symbols: dict[str, Any] = {}
    returns_one = False

    def symbol(name: str) -> Any:
        if name not in symbols:
            source, size = ConstantSource(name), sizes[name]
            one = environment.create_symbol(size, source, dynamic_dim=DimDynamic.DYNAMIC)
            symbols[name] = environment.create_symintnode(one, hint=size, source=source)
        return symbols[name]

    def on_tensors(*tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        nonlocal returns_one
        result = function(*form.given(tensors))
        returns_one = isinstance(result, torch.Tensor)
        return (result,) if isinstance(result, torch.Tensor) else tuple(result)

    with mode:
        stand_ins = [one.empty(symbol) for one in form.tensors]
    trace = make_fx(on_tensors, select_decomp_table(), "symbolic" if symbols else "fake")
    with torch.no_grad(), tracing(TracingContext(mode)):
        compiled = compile_fx_inner(trace(*stand_ins), stand_ins)
    if environment.guards:
        raise RuntimeError(f"its code depends on sizes: {environment.guards[0].expr}")
    return _with_files(compiled, Code(compiled, returns_one), form)


def _with_files(compiled: Any, code: Code, form: Form) -> Generated:
    module = sys.modules.get(getattr(compiled.current_callable, "__module__", ""))
    if module is None or module.__file__ is None or any(one.device.type != "cpu" for one in form.tensors):
        return Generated(code, None, [])
    text = Path(module.__file__).read_text(encoding="utf-8")
    if "extern_kernels." in text or " = None  # " in text:  # it calls other libraries, or has tensors as constants
        return Generated(code, None, [])
    kernels = [one for one in vars(module).values() if isinstance(one, BuiltinFunctionType) and one.__name__ == "kernel"]
    return Generated(code, text, [Path(str(vars(one.__self__)["__file__"])) for one in kernels])

"""Loads DeepSpeed so that it compiles nothing, prints nothing and joins the process groups that exist."""

import contextlib
import io
import logging
import os
import warnings
from collections.abc import Iterator
from importlib import import_module
from typing import Any

import torch

log = logging.getLogger(__name__)
_MUON = "deepspeed.runtime.zero.muon.original_muon"
"""DeepSpeed imports it whatever the optimizer is. Its decorators, on functions that no engine here calls, would make torch load its
compiler, which takes two seconds on every rank."""


def load(device: torch.device) -> Any:
    """Returns the module `deepspeed`, prepared for ranks on `device`."""
    os.environ["DS_ACCELERATOR"] = device.type
    os.environ.setdefault("LOCAL_RANK", str(device.index or 0))  # DeepSpeed asks for it; torchrun and the launcher set it
    with quiet():
        library = import_module("deepspeed")
        for name in ("comm", "ops", "utils.groups", "runtime.zero.parameter_offload"):
            import_module(f"deepspeed.{name}")
        with _compiling_nothing():
            import_module(_MUON)
    # This operation would be compiled, for a minute, when DeepSpeed meets torch.distributed; training does not use it.
    library.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    logger = logging.getLogger("DeepSpeed")
    logger.handlers.clear()  # it writes to stdout
    logger.propagate, level = True, logging.ERROR
    logger.setLevel(level)
    warnings.filterwarnings("ignore", message=r"`torch\.distributed\.\w+` is deprecated", category=FutureWarning)
    return library


@contextlib.contextmanager
def _compiling_nothing() -> Iterator[None]:
    """Within this context, `torch.compile` leaves functions as they are."""
    before = torch.compile
    torch.compile = lambda function, *_, **__: function  # type: ignore[assignment]
    try:
        yield
    finally:
        torch.compile = before


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Within this context, what DeepSpeed prints to stdout goes to this module's log, at level DEBUG."""
    printed = io.StringIO()
    try:
        with contextlib.redirect_stdout(printed):
            yield
    finally:
        if printed.getvalue():
            log.debug("%s", printed.getvalue().rstrip())

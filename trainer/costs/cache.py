"""Keeps what was measured in the user's cache folder, so that nothing is measured twice on the same device.

    CACHE/costs/KEY.json        costs of a model's layers
    CACHE/operators/KEY.json    times of an operator's variants (operator_times.py)

KEY is a hash of everything that the figures depend on; the file repeats it. Files are written atomically; figures in a file that
cannot be read are measured again.
"""

import hashlib
import json
import logging
import platform
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeVar

import torch

from bagualu.fault_tolerance.files import write_atomic
from bagualu.trainer.costs.measured import MeasuredCosts, measure
from bagualu.trainer.costs.work import ModelWork

FORMAT = 5
"""A number in the KEY of the files of layers. Raise it when what is measured, or how it is measured, changes."""

T = TypeVar("T")
log = logging.getLogger(__name__)


def figures(cache: Path, work: ModelWork, device: torch.device) -> dict[str, MeasuredCosts]:
    """Returns the costs by kind of layer, either from the cache or measured and then stored there."""
    return kept(
        cache / "costs",
        _depends_on(work, device),
        measure=lambda: measure(work, device),
        read=lambda stored: {kind: MeasuredCosts(**one) for kind, one in stored.items()},
        plain=lambda found: {kind: asdict(one) for kind, one in found.items()},
    )


def kept(
    folder: Path,
    depends_on: dict[str, Any],
    measure: Callable[[], T],
    read: Callable[[Any], T],
    plain: Callable[[T], Any],
) -> T:
    """Returns the result of `measure`, or the result of an earlier call with the same `depends_on` that is in `folder`. `plain`
    returns a result as JSON values, `read` reads it from them. A failure to write the folder is only logged."""
    key = hashlib.blake2b(json.dumps(depends_on).encode(), digest_size=16).hexdigest()
    path = folder / f"{key}.json"
    found = _load(path, depends_on, read)
    if found is None:
        found = measure()
        try:
            _store(path, {"depends_on": depends_on, "figures": plain(found)})
        except OSError as error:
            log.warning("cannot keep what was measured in %s (%s); give data.cache=FOLDER with room to write", folder, error)
    return found


def device_name(device: torch.device) -> str:
    """Returns the device's product name; for a CPU whose product name is unknown, the name of its architecture."""
    if device.type == "cuda":
        return str(torch.cuda.get_device_name(device))
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    named = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return named[0] if named else platform.processor() or platform.machine()


def on_device(device: torch.device) -> dict[str, Any]:
    """Returns what all times on `device` depend on."""
    return {
        "device": device_name(device), "threads": torch.get_num_threads(), "torch": torch.__version__,
        "deterministic": torch.are_deterministic_algorithms_enabled(),
    }  # fmt: skip


def _depends_on(work: ModelWork, device: torch.device) -> dict[str, Any]:
    """Returns everything that the costs depend on. ZeRO and the numbers of replicas and stages do not matter."""
    return {
        "format": FORMAT, "model": asdict(work.model), "frozen": sorted(work.frozen),
        "tensor": work.layout.tensor, "expert": work.layout.expert,
        "sequence_length": work.sequence_length, "micro_batch": work.micro_batch, "dtype": work.dtype,
        "operators": work.operators.as_dict(), **on_device(device),
    }  # fmt: skip


def _load(path: Path, depends_on: dict[str, Any], read: Callable[[Any], T]) -> T | None:
    try:
        stored = json.loads(path.read_text(encoding="utf-8"))
        if stored["depends_on"] != depends_on:
            raise ValueError("it is for another model, device or version")
        return read(stored["figures"])
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        log.warning("what was measured in %s is damaged (%s) and is measured again", path, error)
        return None


def _store(path: Path, content: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, (json.dumps(content, indent=1) + "\n").encode())

"""Keeps measured costs in the user's cache folder, so that a model is not measured twice on the same device.

    CACHE/costs/KEY.json        written atomically; if it cannot be read, the costs are measured again

KEY is a hash of everything that the costs depend on; the file repeats it.
"""

import hashlib
import json
import logging
import platform
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from bagualu.fault_tolerance.files import write_atomic
from bagualu.trainer.costs.measured import MeasuredCosts, measure
from bagualu.trainer.costs.work import ModelWork

FORMAT = 4
"""A number in the KEY of a cache file. Raise it when what is measured, or how it is measured, changes."""

log = logging.getLogger(__name__)


def figures(cache: Path, work: ModelWork, device: torch.device) -> dict[str, MeasuredCosts]:
    """Returns the costs by kind of layer, either from the cache or measured and then stored there. A failure to write the cache is
    only logged."""
    depends_on = _depends_on(work, device)
    key = hashlib.blake2b(json.dumps(depends_on).encode(), digest_size=16).hexdigest()
    path = cache / "costs" / f"{key}.json"
    found = _load(path, depends_on)
    if found is None:
        found = measure(work, device)
        try:
            _store(path, {"depends_on": depends_on, "figures": {kind: asdict(one) for kind, one in found.items()}})
        except OSError as error:
            log.warning("cannot keep the measured costs in %s (%s); give data.cache=FOLDER with room to write", path.parent, error)
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


def _depends_on(work: ModelWork, device: torch.device) -> dict[str, Any]:
    """Returns everything that the costs depend on. ZeRO and the numbers of replicas and stages do not matter."""
    return {
        "format": FORMAT, "model": asdict(work.model), "frozen": sorted(work.frozen),
        "tensor": work.layout.tensor, "expert": work.layout.expert,
        "sequence_length": work.sequence_length, "micro_batch": work.micro_batch, "dtype": work.dtype,
        "operators": work.operators.as_dict(),
        "device": device_name(device), "threads": torch.get_num_threads(), "torch": torch.__version__,
        "deterministic": torch.are_deterministic_algorithms_enabled(),
    }  # fmt: skip


def _load(path: Path, depends_on: dict[str, Any]) -> dict[str, MeasuredCosts] | None:
    try:
        stored = json.loads(path.read_text(encoding="utf-8"))
        if stored["depends_on"] != depends_on:
            raise ValueError("it is for another model, device or version")
        return {kind: MeasuredCosts(**one) for kind, one in stored["figures"].items()}
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        log.warning("the measured costs %s are damaged (%s) and are measured again", path, error)
        return None


def _store(path: Path, content: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, (json.dumps(content, indent=1) + "\n").encode())

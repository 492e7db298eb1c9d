"""What a forecast assumes beside the recipe and the cluster: each figure with its range and its source."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from difflib import get_close_matches

from bagualu.comm.errors import RecipeError

_RECOVERY = "measured: tests/bench/recovery.py, 4 processes on one machine (docs/performance.md)"


def _figure(value: float, low: float, high: float, source: str) -> float:
    """Returns a field: its default, the range in which it may well lie, and where it comes from."""
    result: float = field(default=value, metadata={"low": low, "high": high, "source": source})
    return result


@dataclass(frozen=True)
class Assumptions:
    """The figures that neither the recipe nor the cluster's file holds. Sources say measured, published or assumed."""

    failure_factor: float = _figure(
        1.0, 0.5, 1.72,
        "assumed: times the cluster's failure rates. High: 6.5 failures in 1,000 node days, Meta's RSC-1 (arXiv 2410.21680)",
    )  # fmt: skip
    hang_fraction: float = _figure(
        0.10, 0.0, 0.3,
        "published: Llama 3, table 5, 35 failures of switches and cables and 7 timeouts of NCCL out of 419; the rest end a process",
    )  # fmt: skip
    silent_per_device_hour: float = _figure(
        0.0, 0.0, 2.8e-7,
        "assumed: cluster files count silent faults among those of the chip. High: 6 of the 419 of Llama 3, found by checks",
    )  # fmt: skip
    exit_seconds: float = _figure(
        0.1, 0.1, 5.0, "measured: the launcher looks ten times a second (ledger of a rehearsal: detection)"
    )  # fmt: skip
    workers_seconds: float = _figure(
        0.4, 0.4, 30.0, _RECOVERY + "; assumed: all nodes start at the same time, as quickly as one"
    )  # fmt: skip
    connect_seconds_per_device: float = _figure(
        265 / 96_000, 24 / 96_000, 0.01,
        "published: NCCL needs 265 s for 96,000 devices, Meta's NCCLX an eleventh of that (arXiv 2510.20171); assumed: linear",
    )  # fmt: skip
    resume_seconds: float = _figure(
        0.45, 0.2, 30.0, _RECOVERY + ", until a small state is back; the time of its bytes is added"
    )  # fmt: skip
    warm_up_steps: float = _figure(1.0, 0.0, 10.0, "assumed: by how many steps the first step of a process takes longer")
    storage_factor: float = _figure(
        1.0, 0.2, 4.0, "assumed: times the storage bandwidths of the cluster's file, which are per device: they grow with the world"
    )  # fmt: skip
    copy_bytes_per_second: float = _figure(
        2.0e10, 5.0e9, 5.0e10,
        "measured: tests/bench/checkpoint.py stall, 1.5 GB in 0.08 s within host memory; assumed: the same from a device's memory",
    )  # fmt: skip
    write_slowdown: float = _figure(
        0.0, 0.0, 0.05, "measured: tests/bench/checkpoint.py stall, steps beside a save differ no more than other steps do"
    )  # fmt: skip
    verify_bytes_per_second: float = _figure(
        1.0e10, 4.0e9, 2.0e10, "measured: tests/bench/checkpoint_load.py, bytes in the page cache, hashed and put into tensors"
    )  # fmt: skip
    replica_bytes_per_second: float = _figure(
        1.0e9, 2.5e8, 1.0e10,
        "assumed: state of a rank, copied to memory and to another node's; tests/bench/recovery.py --replication measures it",
    )  # fmt: skip
    replica_loss: float = _figure(
        0.01, 0.0, 0.1, "assumed: the fraction of failures that take a node and the next one, so that no replica is left"
    )  # fmt: skip
    swap_seconds: float = _figure(
        60.0, 8.0, 600.0, "assumed: until the batch system has started an agent on a spare node; a lost agent is noticed after 8 s"
    )  # fmt: skip
    repair_hours: float = _figure(24.0, 4.0, 96.0, "assumed: mean time until a lost node can be used again")

    def changed(self, values: Mapping[str, float | str]) -> "Assumptions":
        """Returns the assumptions with other values of some. Raises RecipeError for an unknown key or an impossible value."""
        known = [entry.name for entry in fields(self)]
        numbers = {}
        for key, value in values.items():
            if key not in known:
                near = get_close_matches(key, known, n=1)
                hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(known)}"
                raise RecipeError(f"unknown assumption {key}; {hint}")
            try:
                numbers[key] = float(value)
            except ValueError:
                raise RecipeError(f"{key}={value} must be a number, e.g. {key}={getattr(self, key):g}") from None
        result = replace(self, **numbers)
        result.validate()
        return result

    def validate(self) -> None:
        """Raises RecipeError if a figure is impossible."""
        for entry in fields(self):
            value = getattr(self, entry.name)
            divisor = entry.name.endswith("_bytes_per_second") or entry.name == "storage_factor"
            if not math.isfinite(value) or value < 0 or (divisor and value == 0):
                least = "above 0" if divisor else "at least 0"
                raise RecipeError(f"{entry.name}={value} must be a finite number {least}, e.g. {entry.name}={entry.default:g}")
        for name in ("hang_fraction", "replica_loss"):
            if getattr(self, name) > 1:
                raise RecipeError(f"{name}={getattr(self, name)} is a fraction and must be at most 1, e.g. {name}=0.1")

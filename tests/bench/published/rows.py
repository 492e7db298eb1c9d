"""The rows of a file of published runs: what each measured, and which figures can be compared with a prediction.

A file has a line for each run, with the columns that `Row` reads; others are ignored. Figures are left out by these rules alone,
whoever published them.
"""

import csv
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

GIB = 2**30


@dataclass(frozen=True)
class Published:
    """What a row measured. None: nothing that can be compared."""

    step_seconds: float | None
    memory_bytes: int | None
    """Of the fullest device, as its driver reports it."""
    fits: bool | None
    """False: the run ran out of memory."""
    only_tensors: bool = False
    """Whether `memory_bytes` counts what tensors hold, without what the driver adds."""


@dataclass(frozen=True)
class Row:
    """A line of the file."""

    cells: Mapping[str, str]

    def text(self, column: str) -> str:
        return (self.cells.get(column) or "").strip()

    def number(self, column: str) -> float | None:
        """Returns the number in a column; None if it is empty or holds something else."""
        try:
            return float(self.text(column))
        except ValueError:
            return None

    def whole(self, column: str) -> int | None:
        """Returns the whole number in a column; None if it is empty or holds something else."""
        number = self.number(column)
        return int(number) if number is not None and number == int(number) else None

    def degree(self, column: str) -> int:
        """Returns the degree of an axis, 1 if the column is empty."""
        return self.whole(column) or 1

    @property
    def single_node(self) -> bool:
        """Whether all devices of the run are in one node."""
        devices, node = self.whole("n_devices"), self.whole("devices_per_node")
        return devices is not None and node is not None and devices <= node

    def published(self) -> tuple[Published, list[str]]:
        """Returns what can be compared, and the reason for each figure that is left out."""
        seconds, size = self.number("iter_time_s"), self.number("mem_gib")
        time_kind, size_kind = self.text("iter_time_kind").lower(), self.text("mem_kind").lower()
        reasons = []
        if "flops formula" in time_kind:
            seconds = None
            reasons.append("the time is derived from a formula of FLOPs")
        if size is not None and any(word in size_kind for word in ("analytic", "read off", "formula")):
            size = None
            reasons.append("the memory is not measured")
        ran_out = "oom" in (time_kind, size_kind) or size_kind.startswith("oom")
        ran = seconds is not None or size is not None
        if not ran and not ran_out and not reasons:
            reasons.append("neither a time nor memory is given")
        driver = "nvidia-smi" in size_kind or "smi" in size_kind
        memory = None if size is None else round(size * GIB)
        return Published(seconds, memory, False if ran_out else True if ran else None, not driver), reasons


def read_rows(path: Path) -> Iterator[Row]:
    """Yields the rows of a CSV file."""
    with path.open(newline="", encoding="utf-8") as file:
        for cells in csv.DictReader(file):
            yield Row(cells)

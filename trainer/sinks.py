"""Where the figures of a run go: metrics.jsonl. Weights & Biases is in `wandb_sink`, what a person sees in `progress`.

A record is one flat dict for one optimizer step: `step` (steps done, from 1), `loss`, `grad_norm`, `lr`, `tokens`,
`tokens_per_second`, `step_seconds`, `mfu`, `checkpoint_seconds` (time that checkpoints have taken from training since the line
before), and what else applies, e.g. `validation_loss`, `validation_bits_per_byte`, `checkpoint_error`.
"""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from bagualu.fault_tolerance.lines import Lines

Record = Mapping[str, Any]


class Sink(Protocol):
    """Takes the records of a run in the order of their steps, on one rank."""

    def write(self, record: Record) -> None:
        """Take the record of one optimizer step."""
        ...

    def rewind(self, step: int) -> None:
        """The run has gone back to `step`: what was written about later steps does not count, they come again."""
        ...

    def close(self) -> None:
        """Finish what has been written. Nothing is written after it."""
        ...


class JsonlSink:
    """One JSON object a line, each in the file as soon as it is written, so a killed run keeps its lines."""

    def __init__(self, path: Path, after_step: int = 0) -> None:
        """Go on after step `after_step` (0: from the start): the lines from that of the first later step on are removed."""
        self._lines = Lines(path)
        self.rewind(after_step)

    def write(self, record: Record) -> None:
        """Never raises: a line that finds no room on the disk waits for the next one."""
        self._lines.add(to_json(record))

    def rewind(self, step: int) -> None:
        """To shorten a file takes no room, and leaves no moment without the lines that stay."""
        path, size = self._lines.path, 0
        for line in path.read_bytes().splitlines(keepends=True) if path.exists() else []:
            if not line.endswith(b"\n") or _step(line) > step:
                break
            size += len(line)
        self._lines.truncate(size)

    def close(self) -> None:
        self._lines.close()


def to_json(record: Record) -> str:
    """One line of JSON. What is not finite becomes null: NaN is not JSON, and other readers stop at it."""
    finite = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in record.items()}
    return json.dumps(finite, allow_nan=False)


def _step(line: bytes) -> float:
    """The step of a line; infinite for what is none."""
    try:
        return float(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return math.inf

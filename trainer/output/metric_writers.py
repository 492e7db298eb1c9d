"""Writes the metrics of a run to metrics.jsonl. `wandb_sink` sends them to Weights & Biases, `progress` shows them to people.

A record is a flat dict for an optimizer step: `step` (steps done, from 1), `loss`, `grad_norm`, `lr`, `tokens`,
`tokens_per_second`, `step_seconds`, `mfu`, `checkpoint_seconds` (how long training stood still for checkpoints since the
previous record), and what else applies, e.g. `validation_loss`, `validation_bits_per_byte`, `checkpoint_error`; with mixtures of
experts at each validation `expert_loads` (how many of its tokens each expert of a layer got, by the number of the layer) and
`expert_imbalance`.
"""

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from bagualu.comm import jsonl
from bagualu.fault_tolerance.append_log import AppendLog

log = logging.getLogger(__name__)
Record = Mapping[str, Any]


class Sink(Protocol):
    """Receives the records of a run in the order of their steps, on rank 0."""

    def write(self, record: Record) -> None:
        """Receives the record of an optimizer step."""
        ...

    def rewind(self, step: int) -> None:
        """Discards the records of steps after `step`: the run has gone back to the state after `step` steps and will do later steps
        again."""
        ...

    def close(self) -> None:
        """Finishes writing. Nothing is written after this."""
        ...


class JsonlSink:
    """Writes a JSON object per line, without buffering, so that a killed run keeps its lines."""

    def __init__(self, path: Path, after_step: int = 0) -> None:
        """Continues the file `path` after step `after_step` (0: from the start): removes the lines of later steps, as `rewind`
        does."""
        self._lines = AppendLog(path)
        self.rewind(after_step)

    def write(self, record: Record) -> None:
        """Appends a line. Raises no OSError: if the disk is full, the line is kept in memory and written with a later line."""
        self._lines.add(jsonl.dumps(record))

    def rewind(self, step: int) -> None:
        """Keeps only the newest line of each step up to `step`, in the order of the steps, and removes damaged lines with a
        warning.

        The file holds all lines that stay at every moment, even if the process is killed or the disk is full. Raises OSError.
        """
        path = self._lines.path
        data = path.read_bytes() if path.exists() else b""
        kept, damaged = _up_to(step, data)
        if damaged:
            log.warning("%s: %d damaged lines are removed; every whole line of the steps up to %d stays", path, damaged, step)
        if data.startswith(kept):  # the usual case; truncating needs no disk space
            self._lines.truncate(len(kept))
        else:
            self._lines.replace(kept)

    def close(self) -> None:
        self._lines.close()


def _up_to(step: int, data: bytes) -> tuple[bytes, int]:
    """Returns, of a metrics file's content `data`, what `JsonlSink.rewind` keeps, and the number of damaged lines."""
    newest: dict[int, bytes] = {}
    damaged = 0
    for line, record in jsonl.lines(data):
        number = record.get("step") if record else None
        if type(number) is not int or number < 1:
            damaged += 1
        elif number <= step:
            newest[number] = line
    return b"".join(newest[number] + b"\n" for number in sorted(newest)), damaged

"""Where the figures of a run go: metrics.jsonl. Weights & Biases is in `wandb_sink`, what a person sees in `progress`.

A record is one flat dict for one optimizer step: `step` (steps done, from 1), `loss`, `grad_norm`, `lr`, `tokens`,
`tokens_per_second`, `step_seconds`, `mfu`, `checkpoint_seconds` (time that checkpoints have taken from training since the line
before), and what else applies, e.g. `validation_loss`, `validation_bits_per_byte`, `checkpoint_error`.
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
        """Go on after step `after_step` (0: from the start), as `rewind` does."""
        self._lines = AppendLog(path)
        self.rewind(after_step)

    def write(self, record: Record) -> None:
        """Never raises: a line that finds no room on the disk waits for the next one."""
        self._lines.add(jsonl.dumps(record))

    def rewind(self, step: int) -> None:
        """Keep the newest line of every step up to `step`, in the order of the steps, wherever it stands; nothing else.

        At every moment, a kill -9 or a full disk included, the file holds all lines that stay. Raises OSError.
        """
        path = self._lines.path
        data = path.read_bytes() if path.exists() else b""
        kept, damaged = _up_to(step, data)
        if damaged:
            log.warning("%s: %d damaged lines are removed; every whole line of the steps up to %d stays", path, damaged, step)
        if data.startswith(kept):  # as a rule: to shorten a file takes no room
            self._lines.truncate(len(kept))
        else:
            self._lines.replace(kept)

    def close(self) -> None:
        self._lines.close()


def _up_to(step: int, data: bytes) -> tuple[bytes, int]:
    """The lines of a metrics file that `JsonlSink.rewind` keeps, and how many lines are damaged."""
    newest: dict[int, bytes] = {}
    damaged = 0
    for line, record in jsonl.lines(data):
        number = record.get("step") if record else None
        if type(number) is not int or number < 1:
            damaged += 1
        elif number <= step:
            newest[number] = line
    return b"".join(newest[number] + b"\n" for number in sorted(newest)), damaged

"""Where the figures of a run go: metrics.jsonl and Weights & Biases. What a person sees is in `progress`.

A record is one flat dict for one optimizer step: `step` (steps done, from 1), `loss`, `grad_norm`, `lr`, `tokens`,
`tokens_per_second`, `step_seconds`, `mfu`, `checkpoint_seconds` (time that checkpoints have taken from training since the line
before), and what else applies, e.g. `validation_loss`, `validation_bits_per_byte`, `checkpoint_error`.
"""

import json
import math
import uuid
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


class WandbSink:
    """Records to Weights & Biases; `offline` writes below the run directory and needs no network.

    A resumed run goes on in the same W&B run, whose id is kept in the run directory. W&B ignores a step it already has,
    so steps done again after a resume keep the figures of the first time there; metrics.jsonl has those of the second.
    """

    def __init__(self, run_dir: Path, project: str, name: str, mode: str, config: Mapping[str, Any]) -> None:
        """`mode`: offline | online (`log.wandb`). `config`: the resolved recipe."""
        import wandb  # takes a second to import, and most runs do without it

        run_dir.mkdir(parents=True, exist_ok=True)
        self._run = wandb.init(
            project=project,
            name=name,
            id=_run_id(run_dir / "wandb-id"),
            resume="allow" if mode == "online" else None,
            dir=str(run_dir),
            mode="online" if mode == "online" else "offline",
            config=dict(config),
            settings=wandb.Settings(silent=True, console="off"),
        )

    def write(self, record: Record) -> None:
        self._run.log({key: value for key, value in record.items() if key != "step"}, step=int(record["step"]))

    def rewind(self, step: int) -> None:
        return None  # W&B has no way back: see above

    def close(self) -> None:
        self._run.finish()


def _run_id(path: Path) -> str:
    if not path.exists():
        path.write_text(uuid.uuid4().hex[:12])
    return path.read_text().strip()

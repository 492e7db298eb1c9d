"""Verifies written checkpoints before older ones are removed.

After a commit, every rank reads its own shard of the checkpoint that will be the oldest kept after the next save, and compares it
with the hashes that it took before writing. So no checkpoint is removed before a newer one has been verified completely.
"""

import contextlib
import os
from pathlib import Path
from typing import Any

from bagualu.fault_tolerance.checkpoint.layout import format
from bagualu.fault_tolerance.checkpoint.layout.blocks import open_file
from bagualu.fault_tolerance.checkpoint.layout.format import Manifest, StoredBox, StoredFile, StoredTensor
from bagualu.fault_tolerance.checkpoint.reading.inspect import damage


class LookBack:
    """Verifies a rank's shards in the checkpoints that the run has saved. `check` runs in the writer thread."""

    def __init__(self, keep: int) -> None:
        self.damaged: dict[str, str] = {}
        """For each checkpoint in which this rank's shard is damaged, by name: the first problem."""
        self._keep = keep
        self._written: list[tuple[Path, dict[str, Any]]] = []

    def wrote(self, checkpoint: Path, report: dict[str, Any]) -> None:
        """Records that `checkpoint` is committed. `report` is what `write_shard` returned for this rank's part."""
        self._written = [written for written in self._written if written[0].name < checkpoint.name][1 - self._keep :]
        self._written.append((checkpoint, report))
        self.damaged.pop(checkpoint.name, None)

    def check(self) -> None:
        """Reads this rank's shard of the checkpoint that will be the oldest kept after the next save; adds what is wrong to
        `damaged`. Does nothing with keep=1 or before `keep` - 1 checkpoints exist."""
        if not 1 < self._keep <= len(self._written) + 1:
            return
        checkpoint, report = self._written[1 - self._keep]
        try:
            problems = _problems(checkpoint, report)
        except Exception as error:  # a checkpoint that cannot be read does not count as whole
            problems = [f"{checkpoint}: {error!r}"]
        if problems and checkpoint.is_dir():  # it was not removed in the meantime
            self.damaged[checkpoint.name] = problems[0]


def _problems(checkpoint: Path, report: dict[str, Any]) -> list[str]:
    if report["file"] is None:
        return []
    boxes = []
    for entry in report["boxes"]:
        box = StoredBox(**entry["stored"])
        boxes.append((entry["name"], StoredTensor(tuple(entry["global_shape"]), entry["dtype"], ()).bytes_of(box), box))
    name = boxes[0][2].file
    with contextlib.suppress(OSError), open_file(checkpoint / name) as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)  # so that the data come from storage, not from memory
    manifest = Manifest(0, {}, format.BLOCK_BYTES)
    manifest.files[name] = StoredFile(**report["file"])
    return damage(checkpoint, manifest, name, boxes)

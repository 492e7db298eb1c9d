"""Reading again what was written, before what is older may go. Free of torch.

After a commit every rank reads its own shard of the checkpoint that will be the oldest one kept after the next save, and compares
it with the hashes that it took before writing. So no checkpoint goes before one that stays has been read back whole.
"""

import contextlib
import os
from pathlib import Path
from typing import Any

from bagualu.fault_tolerance.checkpoint import format
from bagualu.fault_tolerance.checkpoint.blocks import open_file
from bagualu.fault_tolerance.checkpoint.format import Manifest, StoredBox, StoredFile, StoredTensor
from bagualu.fault_tolerance.checkpoint.inspect import damage


class LookBack:
    """One rank's shards in the checkpoints that it has helped to save. `check` runs in the writer thread."""

    def __init__(self, keep: int) -> None:
        self.damaged: dict[str, str] = {}
        """Names of checkpoints that have turned out damaged here, and how."""
        self._keep = keep
        self._written: list[tuple[Path, dict[str, Any]]] = []

    def wrote(self, checkpoint: Path, report: dict[str, Any]) -> None:
        """`checkpoint` is committed; `report` is what write_shard told of this rank's part."""
        self._written = [one for one in self._written if one[0].name < checkpoint.name][1 - self._keep :]
        self._written.append((checkpoint, report))
        self.damaged.pop(checkpoint.name, None)

    def check(self) -> None:
        """Read this rank's shard of the checkpoint that the next save leaves the oldest."""
        if not 1 < self._keep <= len(self._written) + 1:
            return
        checkpoint, report = self._written[1 - self._keep]
        try:
            problems = _problems(checkpoint, report)
        except Exception as error:  # what could not be looked at does not count either
            problems = [f"{checkpoint}: {error!r}"]
        if problems and checkpoint.is_dir():  # and was not removed meanwhile
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
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)  # from the storage, not from what is left in memory
    manifest = Manifest(0, {}, format.BLOCK_BYTES)
    manifest.files[name] = StoredFile(**report["file"])
    return damage(checkpoint, manifest, name, boxes)

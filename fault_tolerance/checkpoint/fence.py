"""Who may commit checkpoints under a directory: the newest start of the run, and nobody who was thought dead. Free of torch.

No lock is held, so nothing is left to break after a kill -9. `.epoch` names the newest start; taking the fence replaces it by one
rename and then sets aside every save under way. Whoever saves makes its directory FIRST and looks at `.epoch` THEN: either it sees
the newer start, or its directory was there to be set aside and its own last rename fails (docs/design/checkpoint_format.md).
"""

import os
import secrets
from dataclasses import dataclass
from pathlib import Path

from bagualu.fault_tolerance.checkpoint.directory import SAVING, clear_stale
from bagualu.fault_tolerance.checkpoint.durable import durable_file, fsync_directory, make_directory, write_all
from bagualu.fault_tolerance.checkpoint.format import CheckpointError, CheckpointStorageError, SupersededError

EPOCH = ".epoch"


@dataclass(frozen=True)
class Fence:
    """The right of one start of a run to commit under `root`, until a later start takes it."""

    root: Path
    epoch: int
    """Starts so far."""
    token: str
    """Tells two starts at the same instant, which read the same number, apart: the last rename decides."""

    @staticmethod
    def take(root: Path, begun: bool = False) -> "Fence":
        """From now on nobody else commits under `root`, which is made unless the run has `begun`. Raises OSError, CheckpointError.

        Choose what to resume from after this: an older start may have committed until now, and cannot any more.
        """
        if begun and not (root / EPOCH).exists():  # an empty folder in its place would be a run without checkpoints
            raise CheckpointError(f"the run has begun there and {EPOCH} is gone, see whether its storage is mounted")
        make_directory(root)
        fence = Fence(root, _epoch(root) + 1, secrets.token_hex(4))
        unfinished = root / f"{SAVING}epoch-{fence.token}"
        with durable_file(unfinished) as descriptor:
            write_all(descriptor, fence._line)
        os.rename(unfinished, root / EPOCH)
        fsync_directory(root)
        clear_stale(root)
        return fence

    def check(self) -> None:
        """Raises SupersededError when a later start has taken the directory, CheckpointStorageError when that cannot be told."""
        try:
            line = (self.root / EPOCH).read_bytes()
        except OSError as error:
            raise CheckpointStorageError(f"{self.root / EPOCH} cannot be read ({error.strerror}); "
                                         "see whether its storage is still mounted") from error  # fmt: skip
        if line != self._line:
            raise SupersededError(
                f"{self.root} belongs to a later start of this run (number {_epoch(self.root)}, this one is {self.epoch}); "
                "end this process, that one goes on"
            )

    @property
    def _line(self) -> bytes:
        return f"{self.epoch} {self.token}\n".encode()


def _epoch(root: Path) -> int:
    """The number in `.epoch`; 0 when there is none, or what is there was not written by `take`."""
    try:
        return int((root / EPOCH).read_text().split()[0])
    except (FileNotFoundError, ValueError, IndexError):
        return 0

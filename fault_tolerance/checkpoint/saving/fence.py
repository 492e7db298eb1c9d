"""Ensures that only the latest start of a run commits checkpoints, even if a process of an earlier start is still alive.

There is no lock that a kill -9 could leave behind. The file `.epoch` names the latest start. To take the fence, a start replaces
that file by a rename and then sets aside every save in progress. A process that saves makes its directory FIRST and reads `.epoch`
THEN. So either it sees that a later start has taken the fence, or its directory existed in time to be set aside, and its final
rename fails (docs/design/checkpoint_format.md).
"""

import os
import secrets
from dataclasses import dataclass
from pathlib import Path

from bagualu.fault_tolerance.checkpoint.layout.directory import SAVING, clear_stale
from bagualu.fault_tolerance.checkpoint.layout.durable import durable_file, fsync_directory, make_directory, write_all
from bagualu.fault_tolerance.checkpoint.layout.format import CheckpointError, CheckpointStorageError, SupersededError

EPOCH = ".epoch"


@dataclass(frozen=True)
class Fence:
    """The right of one start of a run to commit checkpoints under `root`, until a later start takes it."""

    root: Path
    epoch: int
    """The number of this start: how many starts of the run, including this start, have taken the fence."""
    token: str
    """Random text that distinguishes two simultaneous starts with the same number; the start that renames `.epoch` last has the
    fence."""

    @staticmethod
    def take(root: Path, begun: bool = False) -> "Fence":
        """Takes the right to commit under `root` from every earlier start and returns it. Raises OSError if `root` cannot be
        written, CheckpointError if the run has `begun` but `.epoch` is missing.

        Creates `root` unless the run has already `begun`. Choose the checkpoint to resume from after this call: only from then on
        can no earlier start commit another checkpoint.
        """
        if begun and not (root / EPOCH).exists():  # a new folder would make this a run without checkpoints
            raise CheckpointError(f"the run has begun there but {EPOCH} is missing; see whether its storage is mounted")
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
        """Raises SupersededError if a later start has taken the fence, CheckpointStorageError if `.epoch` cannot be read."""
        try:
            line = (self.root / EPOCH).read_bytes()
        except OSError as error:
            raise CheckpointStorageError(f"{self.root / EPOCH} cannot be read ({error.strerror}); "
                                         "see whether its storage is still mounted") from error  # fmt: skip
        if line != self._line:
            raise SupersededError(
                f"{self.root} belongs to a later start of this run (number {_epoch(self.root)}, this one is {self.epoch}); "
                "end this process, the later one continues"
            )

    @property
    def _line(self) -> bytes:
        return f"{self.epoch} {self.token}\n".encode()


def _epoch(root: Path) -> int:
    """Returns the number in `.epoch`; 0 if the file does not exist or was not written by `take`."""
    try:
        return int((root / EPOCH).read_text().split()[0])
    except (FileNotFoundError, ValueError, IndexError):
        return 0

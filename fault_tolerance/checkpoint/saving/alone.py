"""Saves a checkpoint from a single process that is no rank of a run."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from bagualu.fault_tolerance.checkpoint.layout.directory import temporary_for
from bagualu.fault_tolerance.checkpoint.layout.format import CheckpointError, CheckpointStorageError, step_name
from bagualu.fault_tolerance.checkpoint.layout.shard import Piece, write_shard
from bagualu.fault_tolerance.checkpoint.saving.commit import Claim, commit, manifest_of
from bagualu.fault_tolerance.checkpoint.saving.fence import Fence


def save_alone(root: Path, step: int, pieces: Iterable[Piece], metadata: dict[str, Any]) -> Path:
    """Writes a checkpoint of `step` under `root` and returns its path. The pieces hold every element of every tensor exactly once;
    one at a time is in memory if they are lazy. Raises CheckpointError, with nothing committed."""
    final = root / step_name(step)
    try:
        fence = Fence.take(root)
        if final.exists():
            raise CheckpointError(f"{final} is there already and never overwritten; give another directory")
        temporary = temporary_for(root, step, fence.token)
        temporary.mkdir()
        report = write_shard(temporary / "rank-00000.safetensors", pieces)
        commit(fence, temporary, final, manifest_of(step, metadata, [0], [report]), Claim())
    except OSError as error:
        raise CheckpointStorageError(
            f"{final} cannot be written ({error.strerror}); make room there or give another directory"
        ) from error
    return final

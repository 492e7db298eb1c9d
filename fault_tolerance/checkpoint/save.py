"""Saving: every rank writes and makes durable its part, all vote, rank 0 commits by one rename.

    rank 0       .saving-step-N-* created ............. manifest.json .. rename -> step-N .. prune
    every rank       |  write shard, fsync | vote |                              | outcome |

Until the rename nothing is there to load; after it everything is. A failure anywhere is raised on every rank.
"""

import logging
import os
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from bagualu.comm.group import Group
from bagualu.fault_tolerance.checkpoint import format
from bagualu.fault_tolerance.checkpoint.directory import clear_stale, discard, temporary_for
from bagualu.fault_tolerance.checkpoint.durable import durable_file, fsync_directory, make_directory, write_all
from bagualu.fault_tolerance.checkpoint.exchange import broadcast_json, gather_json
from bagualu.fault_tolerance.checkpoint.format import (
    MANIFEST,
    CheckpointError,
    Manifest,
    StoredBox,
    StoredFile,
    StoredTensor,
    step_name,
)  # fmt: skip
from bagualu.fault_tolerance.checkpoint.manifest import encode
from bagualu.fault_tolerance.checkpoint.retention import prune
from bagualu.fault_tolerance.checkpoint.shard import Piece, write_shard

_HOST = torch.device("cpu")
log = logging.getLogger(__name__)


def save(
    root: Path,
    step: int,
    pieces: Iterable[Piece],
    metadata: dict[str, Any],
    group: Group,
    keep: int,
    device: torch.device = _HOST,
) -> Path:
    """Write a checkpoint of `step` under `root` and return its path. Collective over `group`.

    The pieces of all ranks together hold every element of every tensor exactly once. `metadata` is plain JSON; that of
    position 0 is written. The newest `keep` whole checkpoints stay. `device`: where the group's collectives want them.

    A committed checkpoint is immutable: saving a step that is there already is refused (`discard` it first to go
    another way). Raises CheckpointError on every rank when any rank failed; then nothing new is there and the earlier
    checkpoints are as they were.
    """
    if keep < 1 or step < 0:
        raise ValueError(f"save: keep={keep} must be at least 1 and step={step} at least 0")
    begun = broadcast_json(_attempt(_begin, root, step) if group.rank == 0 else None, group, device)
    _raise_first(step, [begun], group)
    temporary = root / begun["done"]
    group.monitor.at("write")
    shard = temporary / f"rank-{group.ranks[group.rank]:05d}.safetensors"
    reports = gather_json(_attempt(write_shard, shard, pieces), group, device)
    failed = any("error" in report for report in reports)
    outcome = None
    group.monitor.at("commit")
    if group.rank == 0 and not failed:
        outcome = _attempt(_commit, temporary, step, metadata, group, [report["done"] for report in reports])
    if group.rank == 0 and (failed or "error" in (outcome or {})):
        shutil.rmtree(temporary, ignore_errors=True)
    outcome = broadcast_json(outcome, group, device)
    _raise_first(step, reports if failed else [outcome], group)
    final = root / step_name(step)
    group.monitor.at("prune")
    if group.rank == 0:
        _prune_or_warn(root, keep, final)
    return final


def _begin(root: Path, step: int) -> str:
    """Clear away dead saves and create the temporary directory; its name."""
    final, temporary = root / step_name(step), temporary_for(root, step)
    if os.path.lexists(final):
        raise CheckpointError(f"{final} is there already and never overwritten; resume from it or remove it first")
    make_directory(root)
    clear_stale(root)
    temporary.mkdir()
    return temporary.name


def _commit(temporary: Path, step: int, metadata: dict[str, Any], group: Group, reports: list[dict[str, Any]]) -> None:
    """Write the manifest and rename: the commit. Raises OSError, ValueError, CheckpointError."""
    manifest = _manifest(step, metadata, group, reports)
    for name, file in manifest.files.items():
        if not (temporary / name).exists() or (temporary / name).stat().st_size != file.bytes:
            raise CheckpointError(f"rank {group.ranks[0]} does not see {name} as it was written; "
                                  "put run.dir on storage that all nodes share")  # fmt: skip
    raw = encode(manifest)
    with durable_file(temporary / MANIFEST) as descriptor:
        write_all(descriptor, raw)
    fsync_directory(temporary)
    final = temporary.with_name(step_name(step))
    os.rename(temporary, final)
    try:
        fsync_directory(final.parent)
    except OSError:  # visible but perhaps not durable: take it back, so that "not saved" is true
        discard(final)
        raise


def _manifest(step: int, metadata: dict[str, Any], group: Group, reports: list[dict[str, Any]]) -> Manifest:
    """All ranks' reports in one. Raises CheckpointError when they do not make up whole tensors."""
    manifest = Manifest(step, metadata, format.BLOCK_BYTES)
    boxes: dict[str, list[StoredBox]] = {}
    kinds: dict[str, tuple[tuple[int, ...], str]] = {}
    for rank, report in zip(group.ranks, reports, strict=True):
        for entry in report["boxes"]:
            name, kind = entry["name"], (tuple(entry["global_shape"]), entry["dtype"])
            if kinds.setdefault(name, kind) != kind:
                raise CheckpointError(f"tensor {name} is {kinds[name]} on an earlier rank and {kind} on rank {rank}")
            stored = entry["stored"]
            fields = {key: tuple(stored[key]) for key in ("offset", "shape", "hashes")}
            boxes.setdefault(name, []).append(StoredBox(**{**stored, **fields}))
            manifest.files[stored["file"]] = StoredFile(**report["file"])
    for name, (shape, dtype) in kinds.items():
        manifest.tensors[name] = StoredTensor(shape, dtype, tuple(boxes[name]))
    wrong = manifest.problem()
    if wrong:
        raise CheckpointError(wrong)
    return manifest


def _attempt(function: Any, *args: Any) -> dict[str, Any]:
    """{"done": what it returned} or {"error": in one line why not}: an outcome that can be sent to the other ranks."""
    try:
        return {"done": function(*args)}
    except Exception as error:
        kind = "" if isinstance(error, CheckpointError) else f"{type(error).__name__}: "
        return {"error": f"{kind}{error}".replace("\n", " ")}


def _raise_first(step: int, outcomes: list[dict[str, Any]], group: Group) -> None:
    errors = [(rank, o["error"]) for rank, o in zip(group.ranks, outcomes, strict=False) if "error" in o]
    if errors:
        more = f" (and {len(errors) - 1} more ranks)" if len(errors) > 1 else ""
        raise CheckpointError(f"step {step} was not saved: rank {errors[0][0]}{more}: {errors[0][1]}; "
                              "earlier checkpoints are as they were; repair this and save again")  # fmt: skip


def _prune_or_warn(root: Path, keep: int, just_saved: Path) -> None:
    """The checkpoint is committed: that an old one cannot be removed is no reason to call the save failed."""
    try:
        prune(root, keep, just_saved)
    except CheckpointError as error:
        log.warning("checkpoint.keep=%d: %s", keep, error)

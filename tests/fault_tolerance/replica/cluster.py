"""Nodes as folders: what the ranks of a small model do on them. Every element of the model tells the step."""

from collections.abc import Iterator
from pathlib import Path

import torch

from bagualu.comm.group import Communicator
from bagualu.fault_tolerance.checkpoint.layout.format import CheckpointError
from bagualu.fault_tolerance.checkpoint.reading.load import Checkpoint
from bagualu.fault_tolerance.checkpoint.saving.save import take_fence
from bagualu.fault_tolerance.replica.recover import Replica
from bagualu.fault_tolerance.replica.replicas import Replicas
from bagualu.parallel.boxes import Box, TensorPiece


def model(step: int) -> dict[str, torch.Tensor]:
    return {
        "weight/a": torch.arange(48.0).view(12, 4) + 1000 * step,
        "moment/a": torch.full((12, 4), float(step), dtype=torch.float64),
        "count": torch.tensor(step),
        "half/b": torch.full((5,), float(step), dtype=torch.bfloat16),
    }


def pieces(step: int, rank: int, size: int) -> Iterator[TensorPiece]:
    """A rank's share: some rows of each tensor; scalars on the last rank."""
    for name, tensor in model(step).items():
        if not tensor.dim():
            if rank == size - 1:
                yield TensorPiece(name, (), (), tensor)
            continue
        begin, end = (len(tensor) * one // size for one in (rank, rank + 1))
        yield TensorPiece(name, tuple(tensor.shape), (begin, *(0,) * (tensor.dim() - 1)), tensor[begin:end])


def open_replicas(communicator: Communicator, folder: Path, per_node: int, run: str = "run") -> Replicas:
    """As a process does that has just come up; node n has the folder node-n."""
    scratch = folder / f"node-{communicator.rank // per_node}"
    scratch.mkdir(parents=True, exist_ok=True)
    fence = take_fence(folder / "storage", communicator.world)
    return Replicas(scratch, run, f"{fence.epoch:08d}-{fence.token}", communicator.world)


def keep(communicator: Communicator, folder: Path, per_node: int, *steps: int, run: str = "run", way: int = 0) -> bool:
    """A start of the run that begins anew and keeps these steps; whether replicas are still on. Each `way` has other values."""
    replicas = open_replicas(communicator, folder, per_node, run)
    replicas.start(None)
    for step in steps:
        communicator.monitor.step = step
        replicas.keep(step, pieces(step + way, communicator.rank, communicator.size), {"step": step, "way": way})
    return not replicas.off


def resume(communicator: Communicator, folder: Path, per_node: int, run: str = "run") -> tuple[int | None, list[str]]:
    """A start of the run that goes on from the newest replica that is whole: its step, and why newer ones were not.

    Every rank reads its share, and every rank's share of every tensor must be that step's.
    """
    replicas = open_replicas(communicator, folder, per_node, run)
    complaints: list[str] = []
    for replica in replicas.candidates():
        try:
            check(replica, communicator)
        except CheckpointError as error:
            complaints.append(str(error))
            continue
        replicas.start(replica.step)
        return replica.step, complaints
    replicas.start(None)
    return None, complaints


def check(replica: Replica, communicator: Communicator) -> None:
    shapes = list(pieces(0, communicator.rank, communicator.size))
    path = replica.fetch([(piece.name, Box(piece.offset, tuple(piece.tensor.shape))) for piece in shapes])
    checkpoint = Checkpoint(path)
    assert checkpoint.step == replica.step
    assert checkpoint.metadata["step"] == replica.step
    way = checkpoint.metadata.get("way", 0)
    for piece in pieces(replica.step + way, communicator.rank, communicator.size):
        out = torch.empty_like(piece.tensor)
        checkpoint.read(piece.name, piece.offset, out)
        assert torch.equal(out, piece.tensor)

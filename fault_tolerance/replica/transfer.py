"""Sends files from one node's memory to another's with the backend's collectives.

All pairs of ranks exchange data in rounds of all_to_all, so no order of sends and receives can cause a deadlock.
"""

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from bagualu.comm.group import Group

CHUNK_BYTES = 16 * 2**20
"""The most bytes that a rank sends to any one other rank in a round."""


@dataclass(frozen=True)
class Transfer:
    """A file of `bytes` bytes to be sent to another rank, which stores it under the same name. `source` and `destination` are
    positions in the group."""

    source: int
    destination: int
    name: str
    bytes: int


@dataclass(frozen=True)
class _Chunk:
    name: str
    at: int
    bytes: int


def deliver(transfers: Sequence[Transfer], outbox: Path, inbox: Path, group: Group) -> None:
    """Copies files from the sources' `outbox` to the destinations' `inbox`. Collective: all ranks pass the same transfers.

    The caller verifies what arrives. A rank that cannot read or write a file still takes part in all rounds, so that no rank waits
    for it, and raises OSError afterwards.
    """
    pairs: dict[tuple[int, int], list[_Chunk]] = {}
    for transfer in transfers:
        pairs.setdefault((transfer.source, transfer.destination), []).extend(_chunks(transfer))
    going = {destination: chunks for (source, destination), chunks in pairs.items() if source == group.rank}
    coming = {source: chunks for (source, destination), chunks in pairs.items() if destination == group.rank}
    problem: OSError | None = None
    for turn in range(max(map(len, pairs.values()), default=0)):
        sent = [_at(going.get(position), turn) for position in range(group.size)]
        received = [_at(coming.get(position), turn) for position in range(group.size)]
        sizes = [chunk.bytes if chunk else 0 for chunk in sent]
        expected = [chunk.bytes if chunk else 0 for chunk in received]
        outgoing, incoming = torch.empty(sum(sizes), dtype=torch.uint8), torch.empty(sum(expected), dtype=torch.uint8)
        try:
            for chunk, data in zip(sent, _cut(outgoing, sizes), strict=True):
                if chunk:
                    _read(outbox / chunk.name, chunk.at, data)
        except OSError as error:
            problem = problem or error
        arrived = incoming.to(group.device)
        group.all_to_all(arrived, outgoing.to(group.device), expected, sizes)
        try:
            for chunk, data in zip(received, _cut(arrived.cpu(), expected), strict=True):
                if chunk and problem is None:
                    _write(inbox / chunk.name, chunk.at, data)
        except OSError as error:
            problem = problem or error
    if problem is not None:
        raise problem


def _chunks(transfer: Transfer) -> Iterator[_Chunk]:
    for at in range(0, transfer.bytes, CHUNK_BYTES):
        yield _Chunk(transfer.name, at, min(CHUNK_BYTES, transfer.bytes - at))


def _at(chunks: list[_Chunk] | None, turn: int) -> _Chunk | None:
    return chunks[turn] if chunks and turn < len(chunks) else None


def _cut(data: torch.Tensor, sizes: list[int]) -> list[memoryview]:
    return [part.numpy().data for part in data.split(sizes)]


def _read(path: Path, at: int, into: memoryview) -> None:
    """Fills `into` from byte `at` of the file. Raises OSError."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        filled = 0
        while filled < len(into):
            count = os.preadv(descriptor, [into[filled:]], at + filled)
            if not count:
                raise OSError(f"{path} ends too early")
            filled += count
    finally:
        os.close(descriptor)


def _write(path: Path, at: int, data: memoryview) -> None:
    """Writes `data` at byte `at` of the file, creating it if necessary. Raises OSError."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT, 0o644)
    try:
        done = 0
        while done < len(data):
            done += os.pwrite(descriptor, data[done:], at + done)
    finally:
        os.close(descriptor)

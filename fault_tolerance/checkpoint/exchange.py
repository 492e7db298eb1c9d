"""Exchanges small JSON documents between the ranks of a group, with collectives on small tensors."""

import json
from typing import Any

import torch

from bagualu.comm.group import Group


def gather_json(value: Any, group: Group, device: torch.device) -> list[Any]:
    """Returns the values of all ranks, in order of position, on every rank. Collective."""
    data = _tensor(value)
    length = torch.tensor([data.numel()], device=device)
    lengths = torch.empty(group.size, dtype=length.dtype, device=device)
    group.all_gather(lengths, length)
    longest = int(lengths.max())
    padded = torch.zeros(longest, dtype=torch.uint8)
    padded[: data.numel()] = data
    gathered = torch.empty(group.size * longest, dtype=torch.uint8, device=device)
    group.all_gather(gathered, padded.to(device))
    rows = gathered.cpu().view(group.size, longest)
    return [_value(row[:n]) for row, n in zip(rows, lengths.tolist(), strict=True)]


def collect_json(value: Any, group: Group, device: torch.device) -> list[Any] | None:
    """Returns the values of all ranks, in order of position, on position 0; None on the others. Collective.

    Values travel up a binomial tree: position 0 receives log2(size) messages, every other rank holds only its own branch, and only
    position 0 parses them.
    """
    branch, distance = json.dumps(value).encode(), 1
    while distance < group.size:
        if group.rank & distance:
            group.send(torch.tensor([len(branch)], device=device), group.rank - distance)
            group.send(torch.frombuffer(bytearray(branch), dtype=torch.uint8).to(device), group.rank - distance)
            return None
        if group.rank + distance < group.size:
            length = torch.empty(1, dtype=torch.int64, device=device)
            group.receive(length, group.rank + distance)
            buffer = torch.empty(int(length), dtype=torch.uint8, device=device)
            group.receive(buffer, group.rank + distance)
            branch += b"," + buffer.cpu().numpy().tobytes()
        distance *= 2
    values: list[Any] = json.loads(b"[" + branch + b"]")
    return values


def broadcast_json(value: Any, group: Group, device: torch.device) -> Any:
    """Returns the value of position 0 on every rank; the values of other ranks are ignored. Collective."""
    data = _tensor(value if group.rank == 0 else None)
    length = torch.tensor([data.numel()], device=device)
    group.broadcast(length, 0)
    buffer = data.to(device) if group.rank == 0 else torch.empty(int(length), dtype=torch.uint8, device=device)
    group.broadcast(buffer, 0)
    return _value(buffer.cpu())


def _tensor(value: Any) -> torch.Tensor:
    return torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)


def _value(data: torch.Tensor) -> Any:
    return json.loads(data.numpy().tobytes())

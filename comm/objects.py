"""Sends JSON values between the ranks of a group, as small tensors."""

import json
from typing import Any

import torch

from bagualu.comm.group import Group


def gather_json(value: Any, group: Group) -> list[Any]:
    """Returns the list of all ranks' `value`s, in order of position, on every rank. Collective."""
    data = _encode(value)
    length = torch.tensor([data.numel()], device=group.device)
    lengths = torch.empty(group.size, dtype=length.dtype, device=group.device)
    group.all_gather(lengths, length)
    longest = int(lengths.max())
    padded = torch.zeros(longest, dtype=torch.uint8)
    padded[: data.numel()] = data
    gathered = torch.empty(group.size * longest, dtype=torch.uint8, device=group.device)
    group.all_gather(gathered, padded.to(group.device))
    rows = gathered.cpu().view(group.size, longest)
    return [_decode(row[:n]) for row, n in zip(rows, lengths.tolist(), strict=True)]


def collect_json(value: Any, group: Group) -> list[Any] | None:
    """Returns the values of all ranks, in order of position, on position 0, and None on all other positions. Collective.

    Values go up a binomial tree: position 0 receives them as at most ceil(log2(size)) bundles and decodes them all; every other
    rank bundles only the values of its own branch, undecoded.
    """
    branch, distance = json.dumps(value).encode(), 1
    while distance < group.size:
        if group.rank & distance:
            group.send(torch.tensor([len(branch)], device=group.device), group.rank - distance)
            group.send(torch.frombuffer(bytearray(branch), dtype=torch.uint8).to(group.device), group.rank - distance)
            return None
        if group.rank + distance < group.size:
            length = torch.empty(1, dtype=torch.int64, device=group.device)
            group.receive(length, group.rank + distance)
            buffer = torch.empty(int(length), dtype=torch.uint8, device=group.device)
            group.receive(buffer, group.rank + distance)
            branch += b"," + buffer.cpu().numpy().tobytes()
        distance *= 2
    values: list[Any] = json.loads(b"[" + branch + b"]")
    return values


def broadcast_json(value: Any, group: Group) -> Any:
    """Returns the value of position 0 on every rank; the values of the others are ignored. Collective."""
    data = _encode(value if group.rank == 0 else None)
    length = torch.tensor([data.numel()], device=group.device)
    group.broadcast(length, 0)
    buffer = data.to(group.device) if group.rank == 0 else torch.empty(int(length), dtype=torch.uint8, device=group.device)
    group.broadcast(buffer, 0)
    return _decode(buffer.cpu())


def _encode(value: Any) -> torch.Tensor:
    return torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)


def _decode(data: torch.Tensor) -> Any:
    return json.loads(data.numpy().tobytes())

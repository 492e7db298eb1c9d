"""Finds TCP connections of ranks whose data are no longer acknowledged: a sign of a lost link. Linux only.

The kernel sends unacknowledged data again and counts the repeats (/proc/PID/net/tcp). The kernel of a busy or stopped peer still
acknowledges data until its buffers are full, so repeats indicate a broken link rather than a broken process.
"""

import contextlib
import os
import socket
import struct
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

_ESTABLISHED = "01"
Address = tuple[str, int]


@dataclass(frozen=True)
class LostLink:
    """A connection with data that the other end does not acknowledge."""

    rank: int
    local: Address
    remote: Address
    peer: int | None
    """The rank at the other end of the connection; None if that end is none of the processes examined, e.g. on another machine."""
    unacknowledged_bytes: int
    repeats: int

    def __str__(self) -> str:
        name = "" if self.peer is None else f" (rank {self.peer})"
        return (f"rank {self.rank} at {_text(self.local)} to {_text(self.remote)}{name}: {self.unacknowledged_bytes} bytes not "
                f"acknowledged, sent again {self.repeats} times")  # fmt: skip


@dataclass(frozen=True)
class _Connection:
    local: Address
    remote: Address
    unacknowledged_bytes: int
    repeats: int


def lost_links(processes: Mapping[int, int]) -> list[LostLink]:
    """Returns the connections of `processes` (the process id of each rank) whose data are sent again and not acknowledged."""
    of_rank = {rank: _connections(pid) for rank, pid in processes.items()}
    owner = {(link.local, link.remote): rank for rank, connections in of_rank.items() for link in connections}
    return [
        LostLink(rank, link.local, link.remote, owner.get((link.remote, link.local)), link.unacknowledged_bytes, link.repeats)
        for rank, connections in of_rank.items()
        for link in connections
        if link.repeats and link.unacknowledged_bytes
    ]


def cut_off(links: list[LostLink]) -> int | None:
    """Returns the rank that is at an end of every one of `links`, if there is exactly one such rank and the links join at least two
    different pairs of ends; else None."""
    ends = [{link.rank, link.peer} - {None} for link in links]
    count = Counter(rank for ranks in ends for rank in ranks)
    everywhere = [rank for rank, times in count.items() if times == len(links)]
    return everywhere[0] if len(everywhere) == 1 and len({frozenset(ranks) for ranks in ends}) > 1 else None


def _connections(pid: int) -> list[_Connection]:
    own, connections = _sockets(pid), []
    for name in ("tcp", "tcp6"):
        with contextlib.suppress(OSError):
            for line in Path(f"/proc/{pid}/net/{name}").read_text().splitlines()[1:]:
                columns = line.split()
                if columns[3] == _ESTABLISHED and columns[9] in own:
                    queued = int(columns[4].split(":")[0], 16)
                    connections.append(_Connection(_address(columns[1]), _address(columns[2]), queued, int(columns[6], 16)))
    return connections


def _sockets(pid: int) -> set[str]:
    """Returns the inodes of the sockets that a process has open."""
    inodes = set()
    with contextlib.suppress(OSError):
        for entry in os.scandir(f"/proc/{pid}/fd"):
            with contextlib.suppress(OSError):
                target = os.readlink(entry.path)
                if target.startswith("socket:["):
                    inodes.add(target[8:-1])
    return inodes


def _address(text: str) -> Address:
    """Returns (address, port) from `text`, ADDRESS:PORT in hexadecimal; the address is in 32-bit words in the machine's byte
    order."""
    address, port = text.split(":")
    raw = b"".join(struct.pack("=I", int(address[i : i + 8], 16)) for i in range(0, len(address), 8))
    mapped = len(raw) == 16 and raw[:12] == bytes(10) + b"\xff\xff"
    if mapped:
        raw = raw[12:]
    return socket.inet_ntop(socket.AF_INET if len(raw) == 4 else socket.AF_INET6, raw), int(port, 16)


def _text(address: Address) -> str:
    return f"{address[0]}:{address[1]}"

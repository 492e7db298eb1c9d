"""TCP connections of the ranks whose data is not acknowledged any more: what a lost link looks like from outside. Linux only.

The kernel repeats what is not acknowledged and counts the repeats (/proc/PID/net/tcp); a busy or stopped peer's kernel still
acknowledges until its buffers are full, so repeats mean the link, not the process.
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
    """A connection with data under way that nobody acknowledges."""

    rank: int
    here: Address
    there: Address
    peer: int | None
    """The rank at the other end; None: it is not on this machine."""
    unacknowledged_bytes: int
    repeats: int

    def __str__(self) -> str:
        name = "" if self.peer is None else f" (rank {self.peer})"
        return (f"rank {self.rank} at {_text(self.here)} to {_text(self.there)}{name}: {self.unacknowledged_bytes} bytes not "
                f"acknowledged, sent again {self.repeats} times")  # fmt: skip


@dataclass(frozen=True)
class _Connection:
    here: Address
    there: Address
    unacknowledged_bytes: int
    repeats: int


def lost_links(processes: Mapping[int, int]) -> list[LostLink]:
    """Those of the processes, by rank."""
    of_rank = {rank: _connections(pid) for rank, pid in processes.items()}
    owner = {(one.here, one.there): rank for rank, connections in of_rank.items() for one in connections}
    return [
        LostLink(rank, one.here, one.there, owner.get((one.there, one.here)), one.unacknowledged_bytes, one.repeats)
        for rank, connections in of_rank.items()
        for one in connections
        if one.repeats and one.unacknowledged_bytes
    ]


def cut_off(links: list[LostLink]) -> int | None:
    """The rank that is at one end of every lost link, where there is exactly one such rank; None: it cannot be told."""
    ends = [{link.rank, link.peer} - {None} for link in links]
    count = Counter(rank for ranks in ends for rank in ranks)
    everywhere = [rank for rank, times in count.items() if times == len(links)]
    return everywhere[0] if len(everywhere) == 1 and len({frozenset(ranks) for ranks in ends}) > 1 else None


def _connections(pid: int) -> list[_Connection]:
    own, found = _sockets(pid), []
    for name in ("tcp", "tcp6"):
        with contextlib.suppress(OSError):
            for line in Path(f"/proc/{pid}/net/{name}").read_text().splitlines()[1:]:
                words = line.split()
                if words[3] == _ESTABLISHED and words[9] in own:
                    queued = int(words[4].split(":")[0], 16)
                    found.append(_Connection(_address(words[1]), _address(words[2]), queued, int(words[6], 16)))
    return found


def _sockets(pid: int) -> set[str]:
    """Inodes of the sockets that a process has open."""
    inodes = set()
    with contextlib.suppress(OSError):
        for entry in os.scandir(f"/proc/{pid}/fd"):
            with contextlib.suppress(OSError):
                target = os.readlink(entry.path)
                if target.startswith("socket:["):
                    inodes.add(target[8:-1])
    return inodes


def _address(word: str) -> Address:
    """ADDRESS:PORT in hexadecimal; the address in words of 32 bits in the machine's byte order."""
    address, port = word.split(":")
    raw = b"".join(struct.pack("=I", int(address[i : i + 8], 16)) for i in range(0, len(address), 8))
    mapped = len(raw) == 16 and raw[:12] == bytes(10) + b"\xff\xff"
    if mapped:
        raw = raw[12:]
    return socket.inet_ntop(socket.AF_INET if len(raw) == 4 else socket.AF_INET6, raw), int(port, 16)


def _text(address: Address) -> str:
    return f"{address[0]}:{address[1]}"

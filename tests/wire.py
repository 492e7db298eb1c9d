"""A network that misbehaves: machines are network namespaces of this one, and every frame between them is carried by hand.

    with Wire([pid, pid, ...]) as wire:        # processes that each have a network of their own (tests/namespaces.py)
        wire.weather = Weather(loss=0.05)
        wire.carry(lambda: everything_is_done)  # until then

Machine i has the address `address(i)` and the interface `eth0`. Whoever makes it must be root of its namespaces: see
`tests.namespaces.become_root`. Nothing stands between the machines' own TCP and this but frames, so what is lost is sent
again, what is garbled fails its checksum, and what is cut off is silent: as on a real network. Linux only.
"""

import array
import fcntl
import heapq
import random
import select
import socket
import struct
import subprocess
import threading
import time
from collections.abc import Callable, Collection
from dataclasses import dataclass
from types import TracebackType
from typing import Self

from tests.namespaces import join_network

_ALL_FRAMES, _OUTGOING = 3, 4
_IPV4, _ARP = b"\x08\x00", b"\x08\x06"
_TCP, _RESET_FLAG = 6, 4
_ETHTOOL, _SEND_CHECKSUMS = 0x8946, 0x17


@dataclass(frozen=True)
class Weather:
    """What becomes of frames."""

    delay_seconds: float = 0.0
    """Each is held up for a random time up to this, so that they overtake each other."""
    loss: float = 0.0
    """The share that is lost."""
    garble: float = 0.0
    """The share that has a bit flipped on the way."""
    reset: bool = False
    """Connections are broken off: the segments that carry data arrive as a reset in their place."""
    cut: Collection[tuple[int, int]] = ()
    """Pairs (from, to) of machines between which nothing arrives, and nobody is told."""


def address(machine: int) -> str:
    return f"10.77.0.{machine + 1}"


def why_not() -> str:
    """Why there can be no such network here; empty when there can."""
    try:
        command = ["unshare", "-rn", "ip", "link", "add", "left", "type", "veth", "peer", "name", "right"]
        return subprocess.run(command, capture_output=True, text=True).stderr.strip()
    except FileNotFoundError as error:
        return str(error)


class Wire:
    """Carries what the machines send each other."""

    def __init__(self, machines: list[int]) -> None:
        """`machines`: a process in the network of each."""
        self.weather = Weather()
        self._random = random.Random(1)
        self._held: list[tuple[float, int, int, bytes]] = []
        self.touched = 0
        """Frames that did not arrive at once and as they were sent."""
        self._sockets = [self._plug_in(machine, pid) for machine, pid in enumerate(machines)]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for machine, one in enumerate(self._sockets):
            one.close()
            subprocess.run(["ip", "link", "del", f"machine{machine}"], check=False, stderr=subprocess.DEVNULL)  # gone by itself?

    def carry(self, until: Callable[[], bool], at_most_seconds: float = 120.0) -> None:
        """Carry frames until `until()` says so; asked a hundred times a second. Raises TimeoutError."""
        deadline, asked = time.monotonic() + at_most_seconds, 0.0
        while True:
            now = time.monotonic()
            if now - asked >= 0.01:
                asked = now
                if until():
                    return
                if now > deadline:
                    raise TimeoutError("the machines did not come to an end")
            ready, _, _ = select.select(self._sockets, [], [], 0.001 if self._held else 0.01)
            for one in ready:
                self._take(one)
            while self._held and self._held[0][0] <= time.monotonic():
                _, _, target, frame = heapq.heappop(self._held)
                self._give(target, frame)

    def _plug_in(self, machine: int, pid: int) -> socket.socket:
        here = f"machine{machine}"
        _do(f"ip link add {here} type veth peer name eth0 netns {pid}")
        _do(f"ip link set {here} up")

        def there() -> None:
            _do("ip link set lo up")
            _do(f"ip addr add {address(machine)}/24 dev eth0")
            _whole_checksums("eth0")
            _do("ip link set eth0 up")

        _inside(pid, there)
        one = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(_ALL_FRAMES))
        one.bind((here, _ALL_FRAMES))
        one.setblocking(False)
        return one

    def _take(self, one: socket.socket) -> None:
        source = self._sockets.index(one)
        while True:
            try:
                frame, about = one.recvfrom(1 << 16)
            except OSError:  # nothing more there, or the machine is gone with its end of the cable
                return
            kind = frame[12:14]
            if about[2] == _OUTGOING or kind not in (_IPV4, _ARP):
                continue
            target = frame[33 if kind == _IPV4 else 41] - 1
            if 0 <= target < len(self._sockets):
                self._pass_on(source, target, frame)

    def _pass_on(self, source: int, target: int, frame: bytes) -> None:
        weather, dice = self.weather, self._random
        lost = (source, target) in weather.cut or dice.random() < weather.loss
        arrives = _as_reset(frame) if weather.reset and _carries_data(frame) else frame
        if dice.random() < weather.garble:
            arrives = _garbled(frame, dice)
        self.touched += lost or arrives is not frame or weather.delay_seconds > 0
        if lost:
            return
        if weather.delay_seconds:
            due = time.monotonic() + dice.uniform(0, weather.delay_seconds)
            heapq.heappush(self._held, (due, self.touched, target, arrives))
        else:
            self._give(target, arrives)

    def _give(self, target: int, frame: bytes) -> None:
        try:
            self._sockets[target].send(frame)
        except OSError:  # no room in the queue, or the machine is gone: lost, as on any wire
            return


def _inside(pid: int, function: Callable[[], None]) -> None:
    """Call `function` in the network of process `pid`: on a thread of its own, which alone goes there."""
    errors: list[BaseException] = []

    def work() -> None:
        try:
            join_network(pid)
            function()
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    if errors:
        raise errors[0]


def _whole_checksums(interface: str) -> None:
    """Frames leave with their checksums filled in; by default that is left to hardware, which a veth has none of."""
    value = array.array("I", [_SEND_CHECKSUMS, 0])
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as one:
        fcntl.ioctl(one, _ETHTOOL, struct.pack("16sP", interface.encode(), value.buffer_info()[0]))


def _carries_data(frame: bytes) -> bool:
    if frame[12:14] != _IPV4 or frame[23] != _TCP:
        return False
    segment = 14 + 4 * (frame[14] & 15)
    return int.from_bytes(frame[16:18], "big") + 14 > segment + 4 * (frame[segment + 12] >> 4)


def _as_reset(frame: bytes) -> bytes:
    """A TCP segment as one that breaks its connection off: the same place in the stream, no data."""
    ip, tcp = bytearray(frame[14:34]), bytearray(frame[14 + 4 * (frame[14] & 15) :][:20])
    ip[0], ip[2:4], ip[10:12] = 0x45, (40).to_bytes(2, "big"), b"\0\0"
    tcp[12], tcp[13], tcp[16:18] = 0x50, _RESET_FLAG, b"\0\0"
    ip[10:12] = _checksum(ip)
    tcp[16:18] = _checksum(ip[12:20] + bytes([0, _TCP, 0, 20]) + tcp)
    return frame[:14] + bytes(ip) + bytes(tcp)


def _checksum(data: bytes | bytearray) -> bytes:
    total: int = sum(struct.unpack(f">{len(data) // 2}H", data))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return (~total & 0xFFFF).to_bytes(2, "big")


def _garbled(frame: bytes, dice: random.Random) -> bytes:
    """With one bit flipped somewhere behind the addresses of the frame itself."""
    spoilt = bytearray(frame)
    spoilt[dice.randrange(14, len(frame))] ^= 1 << dice.randrange(8)
    return bytes(spoilt)


def _do(command: str) -> None:
    subprocess.run(command.split(), check=True)

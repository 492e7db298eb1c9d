"""A network that misbehaves: every Gloo connection to a rank goes through a TCP proxy in its process, driven from outside.

`World(..., rendezvous=f"proxied://{folder}")` puts the proxies in: ranks tell each other their addresses by way of the store,
and the store that they get here puts a proxy's port in place of the real one. Import this module on every rank.
What the proxies do stands in FOLDER/network: pass; delay SECONDS (each piece of data); drop (nothing arrives, nothing ends: a
dead link); drop_in, drop_out (the same, one way, seen from the rank); reset (connections break).
"""

import contextlib
import os
import re
import socket
import struct
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlparse

import torch.distributed as dist

_AF_INET = struct.pack("=H", socket.AF_INET)
_ADDRESS = re.compile(re.escape(_AF_INET) + rb"(..)" + re.escape(socket.inet_aton("127.0.0.1")), re.DOTALL)
_RESET = struct.pack("ii", 1, 0)
"""SO_LINGER that makes close() send a reset."""


class Proxy:
    """Listens in place of a port of this process."""

    def __init__(self, port: int, folder: Path) -> None:
        self.target, self.file = port, folder / "network"
        self.listener = _listen_beside(port)
        self.port: int = self.listener.getsockname()[1]
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        while True:
            outside, _ = self.listener.accept()
            inside = socket.create_connection(("127.0.0.1", self.target))
            for source, sink, direction in ((outside, inside, "in"), (inside, outside, "out")):
                source.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                source.settimeout(0.05)
                threading.Thread(target=self._carry, args=(source, sink, direction), daemon=True).start()

    def _mode(self) -> list[str]:
        try:
            return self.file.read_text().split() or ["pass"]
        except FileNotFoundError:
            return ["pass"]

    def _carry(self, source: socket.socket, sink: socket.socket, direction: str) -> None:
        with contextlib.suppress(OSError):
            while True:
                mode = self._mode()
                if mode[0] == "reset":
                    for end in (source, sink):
                        end.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
                        end.close()
                    return
                if mode[0] in ("drop", f"drop_{direction}"):
                    time.sleep(0.05)
                    continue
                try:
                    data = source.recv(1 << 16)
                except TimeoutError:
                    continue
                if not data:
                    sink.shutdown(socket.SHUT_WR)
                    return
                if mode[0] == "delay":
                    time.sleep(float(mode[1]))
                self._send(sink, data)

    def _send(self, sink: socket.socket, data: bytes) -> None:
        view = memoryview(data)
        while view:
            with contextlib.suppress(TimeoutError):
                view = view[sink.send(view) :]


def _listen_beside(port: int) -> socket.socket:
    """Which of two ranks connects to the other Gloo decides by comparing their ports as they stand on the wire, read as a number of
    this machine: the proxy's port has to compare as the real one does, so it differs in what counts least there."""
    step = 256 if sys.byteorder == "little" else 1
    for other in range(port + step, 65536, step):
        with contextlib.suppress(OSError):
            return socket.create_server(("127.0.0.1", other))
    raise OSError(f"no port free beside {port}")


class ProxiedStore(dist.Store):  # type: ignore[misc]
    """`store`, but that addresses which this rank publishes are those of proxies."""

    def __init__(self, store: Any, folder: Path) -> None:
        super().__init__()
        self.store, self.folder = store, folder
        self.proxies: dict[int, Proxy] = {}

    def set(self, key: str, value: Any) -> None:
        raw = value if isinstance(value, bytes) else bytes(value, "latin-1") if isinstance(value, str) else bytes(value)
        self.store.set(key, _ADDRESS.sub(self._through_proxy, raw))

    def _through_proxy(self, match: re.Match[bytes]) -> bytes:
        port = int.from_bytes(match[1], "big")
        proxy = self.proxies.get(port) or self.proxies.setdefault(port, Proxy(port, self.folder))
        return match[0][:2] + proxy.port.to_bytes(2, "big") + match[0][4:]

    def get(self, key: str) -> bytes:
        found: bytes = self.store.get(key)
        return found

    def multi_set(self, keys: list[str], values: list[Any]) -> None:
        for key, value in zip(keys, values, strict=True):
            self.set(key, value)

    def multi_get(self, keys: list[str]) -> list[bytes]:
        return [self.get(key) for key in keys]

    def has_extended_api(self) -> bool:
        return True

    # torch looks for each of these in the class itself

    def wait(self, *arguments: Any) -> None:
        self.store.wait(*arguments)

    def add(self, key: str, amount: int) -> Any:
        return self.store.add(key, amount)

    def check(self, keys: list[str]) -> Any:
        return self.store.check(keys)

    def delete_key(self, key: str) -> Any:
        return self.store.delete_key(key)

    def compare_set(self, key: str, expected: Any, desired: Any) -> Any:
        return self.store.compare_set(key, expected, desired)

    def num_keys(self) -> Any:
        return self.store.num_keys()


def _rendezvous(url: str, **_: Any) -> Iterator[tuple[Any, int, int]]:
    parsed = urlparse(url)
    folder, query = Path(parsed.path), parse_qs(parsed.query)
    rank, world_size = int(query["rank"][0]), int(query["world_size"][0])
    folder.mkdir(parents=True, exist_ok=True)
    store = dist.FileStore(os.fspath(folder / "store"), world_size)
    yield ProxiedStore(store, folder), rank, world_size


with contextlib.suppress(RuntimeError):  # registered already
    dist.register_rendezvous_handler("proxied", _rendezvous)

"""Addresses of this machine, and the interfaces that have them. Free of torch."""

import socket

import psutil

LOOPBACK = "127.0.0.1"


def addresses_towards(host: str, port: int) -> tuple[str, str]:
    """This machine's address on the way to `host`, and that of `host`; nothing is sent. Names of nodes need not resolve.

    Raises OSError when there is no way to `host`.
    """
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect((host, port))
        return str(probe.getsockname()[0]), str(probe.getpeername()[0])


def interface_of(address: str) -> str | None:
    """The network interface of this machine that has `address`."""
    for name, addresses in psutil.net_if_addrs().items():
        if any(found.address == address for found in addresses):
            return name
    return "lo" if address.startswith("127.") else None  # all of 127/8 is the loopback's

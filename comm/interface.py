"""The addresses of this machine and their network interfaces."""

import socket

import psutil

LOOPBACK = "127.0.0.1"


def addresses_towards(host: str, port: int) -> tuple[str, str]:
    """Returns this machine's address on the route to `host`, and the address of `host`. It sends nothing.

    Only `host` must be resolvable; this machine's own host name need not be. Raises OSError if `host` cannot be resolved or there
    is no route to it.
    """
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect((host, port))
        return str(probe.getsockname()[0]), str(probe.getpeername()[0])


def interface_of(address: str) -> str | None:
    """Returns the name of this machine's network interface that has `address`; None if no interface has it."""
    for name, addresses in psutil.net_if_addrs().items():
        if any(entry.address == address for entry in addresses):
            return name
    return "lo" if address.startswith("127.") else None  # the loopback interface has all addresses of 127/8

"""The addresses that processes listen on."""

import psutil


def listening(*pids: int) -> dict[tuple[int, int], str]:
    """By process and port, of these processes and all that they have started."""
    found = {}
    for pid in pids:
        for process in [psutil.Process(pid), *psutil.Process(pid).children(recursive=True)]:
            for connection in process.net_connections("tcp"):
                if connection.status == psutil.CONN_LISTEN:
                    found[process.pid, connection.laddr.port] = connection.laddr.ip
    return found


def outside_interface() -> str | None:
    """The name of an interface that leads out of this machine."""
    return next((name for name, at in psutil.net_if_addrs().items() if name != "lo" and any("." in a.address for a in at)), None)

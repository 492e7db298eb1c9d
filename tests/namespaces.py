"""Namespaces of this process's own: another network, other mounts. Linux only."""

import ctypes
import os
import subprocess
from pathlib import Path
from typing import Literal

Kind = Literal["network", "mounts"]
NEW_USER, NEW_NETWORK, NEW_MOUNTS = 0x10000000, 0x40000000, 0x00020000


def become_root(kind: Kind) -> None:
    """This process, which must have one thread, leaves its network, or its mounts, for one of its own, of which it is root: what
    `unshare -rn` and `unshare -rm` do before they start a program."""
    user, group = os.geteuid(), os.getegid()
    system_call("unshare", NEW_USER | {"network": NEW_NETWORK, "mounts": NEW_MOUNTS}[kind])
    for name, text in (("setgroups", "deny"), ("uid_map", f"0 {user} 1"), ("gid_map", f"0 {group} 1")):
        Path(f"/proc/self/{name}").write_text(text)
    if kind == "mounts":
        subprocess.run(["mount", "--make-rprivate", "/"], check=True)


def own_network() -> None:
    """This process leaves its network for one of its own, without any link yet."""
    system_call("unshare", NEW_NETWORK)


def join_network(pid: int) -> None:
    """This process, or thread, goes over to the network of process `pid`."""
    with open(f"/proc/{pid}/ns/net") as network:
        system_call("setns", network.fileno(), NEW_NETWORK)


def system_call(name: str, *arguments: int) -> None:
    """A system call that Python has no name for. Raises OSError."""
    if getattr(ctypes.CDLL(None, use_errno=True), name)(*arguments):
        raise OSError(ctypes.get_errno(), f"{name}: {os.strerror(ctypes.get_errno())}")

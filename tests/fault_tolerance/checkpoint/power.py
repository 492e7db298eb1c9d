"""What would be on the disk if the power went now: only what has been synced.

A file's bytes are there as they were at its last fsync, a name in a directory if that was synced after it was given. Everything
else is taken to be lost, deletions included: the strictest reading of what a file system owes.
"""

import os
import stat
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

CALLS = ("open", "write", "fsync", "close", "rename", "mkdir", "unlink", "rmdir")
State = dict[str, bytes | None]
"""Relative path -> bytes of a file, None for a directory."""


class Power:
    """Watches the os calls of all threads; `states` are the durable contents of `root` before each call, without repetitions."""

    def __init__(self, root: Path, patch: pytest.MonkeyPatch, before: Callable[[str, tuple[Any, ...]], None]) -> None:
        """`before(call, args)` is told of every call, outside of the lock."""
        self.root, self.states = root, list[State]()
        self._files: dict[int, bytes] = {}
        self._names: dict[int, dict[str, int]] = {}
        self._lock, self._before = threading.RLock(), before
        self._sync_all(root)
        for name in CALLS:
            patch.setattr(os, name, self._watched(name, getattr(os, name)))

    def state(self) -> State:
        """What is durable now."""
        found: State = {}
        self._collect(os.stat(self.root).st_ino, "", found)
        return found

    def _watched(self, name: str, original: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            self._before(name, args)
            with self._lock:
                now = self.state()
                if not self.states or self.states[-1] != now:
                    self.states.append(now)
                result = original(*args, **kwargs)
                if name == "open" and args[1] & os.O_EXCL:
                    self._files.pop(os.fstat(result).st_ino, None)  # a number that a deleted file had before
                elif name == "mkdir":
                    self._names.pop(os.stat(args[0], dir_fd=kwargs.get("dir_fd")).st_ino, None)
                elif name == "fsync":
                    self._sync(f"/proc/self/fd/{args[0]}")
                return result

        return call

    def _sync(self, path: str) -> None:
        about = os.stat(path)
        if stat.S_ISDIR(about.st_mode):
            with os.scandir(path) as entries:
                self._names[about.st_ino] = {entry.name: entry.inode() for entry in entries}
        else:
            self._files[about.st_ino] = Path(path).read_bytes()

    def _sync_all(self, root: Path) -> None:
        for path in [root, *root.rglob("*")]:
            self._sync(str(path))

    def _collect(self, directory: int, prefix: str, found: State) -> None:
        for name, inode in self._names.get(directory, {}).items():
            if inode in self._files:
                found[prefix + name] = self._files[inode]
            elif name.startswith((".", "step-")) and not name.startswith(".epoch"):
                found[prefix + name] = None
                self._collect(inode, f"{prefix}{name}/", found)
            else:
                found[prefix + name] = b""  # a name whose bytes were never synced


def lay_out(state: State, folder: Path) -> None:
    """Put a durable state into a folder."""
    folder.mkdir()
    for name in sorted(state):
        content = state[name]
        if content is None:
            (folder / name).mkdir()
        else:
            (folder / name).write_bytes(content)

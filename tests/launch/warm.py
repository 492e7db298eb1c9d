"""Launchers forked from a process that has imported what they import: to import torch takes most of a launcher's processor time.

Where starting is the subject, a launcher is started as people start it. The process that is forked has no threads, and the
launcher's own fork server, from which workers come, starts as always.
"""

import ctypes
import functools
import inspect
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
from importlib import import_module
from pathlib import Path
from typing import Any

_SET_CHILD_SUBREAPER = 36
_LONGEST = 2**17
"""Bytes of a request: words and environment."""
ROOT = Path(__file__).parents[2]


class Launcher(subprocess.Popen[str]):
    """`main(words, entrypoint)` of `module` as a process and a session of its own; `options` are those of Popen."""

    def __init__(self, words: list[str], entrypoint: str, module: str = "bagualu.launch.cli", **options: Any) -> None:
        super().__init__([module, entrypoint, *words], text=True, **options)

    def _execute_child(self, *given: Any) -> None:  # the one part of Popen that starts a process
        own = inspect.signature(super()._execute_child).bind(*given).arguments  # type: ignore[misc]
        files = [own[name] if own[name] >= 0 else number for number, name in enumerate(("p2cread", "c2pwrite", "errwrite"))]
        request = {"call": own["args"], "folder": str(own["cwd"] or Path.cwd()), "environment": dict(own["env"] or os.environ)}
        server = _server()
        _adopt(True)  # whose parent has ended becomes a child of this process, to be waited for as any other
        try:
            socket.send_fds(server, [json.dumps(request).encode()], files)
            self.pid, adopted = int(server.recv(_LONGEST)), server.recv(_LONGEST)
            assert adopted
        finally:
            _adopt(False)
        self._child_created = True
        self._close_pipe_fds(*(own[name] for name in inspect.signature(self._close_pipe_fds).parameters))  # type: ignore[attr-defined]


def _adopt(wanted: bool) -> None:
    if ctypes.CDLL(None).prctl(_SET_CHILD_SUBREAPER, int(wanted), 0, 0, 0):
        raise OSError("prctl(PR_SET_CHILD_SUBREAPER) failed")


@functools.cache
def _server() -> socket.socket:
    """The process that launchers are forked from; it ends with this one."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    program = f"import sys; sys.path.insert(0, {str(ROOT)!r}); from tests.launch.warm import serve; serve({theirs.fileno()})"
    subprocess.Popen([sys.executable, "-c", program], pass_fds=[theirs.fileno()], start_new_session=True)
    theirs.close()
    return ours


def serve(descriptor: int) -> None:
    """Fork a launcher for each request, until nobody is there to ask."""
    for module in ("cli", "train", "rehearse", "node", "local"):
        import_module(f"bagualu.launch.{module}")
    with socket.socket(fileno=descriptor) as asked:
        while True:
            request, files, _, _ = socket.recv_fds(asked, _LONGEST, 3)
            if not request:
                return
            if (between := os.fork()) == 0:
                if pid := os.fork():
                    asked.send(str(pid).encode())
                    os._exit(0)
                asked.close()
                _launch(files, **json.loads(request))
            for file in files:
                os.close(file)
            os.waitpid(between, 0)
            asked.send(b"adopted")


def _launch(files: list[int], call: list[str], folder: str, environment: dict[str, str]) -> None:
    module, entrypoint, *words = call
    os.setsid()
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    for number, file in enumerate(files):
        os.dup2(file, number)
        os.close(file)
    tempfile.tempdir = None  # by the environment
    sys.path[:1] = environment.get("PYTHONPATH", "").split(":")
    sys.argv = ["-c", *words]
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell may have the tests, and what they start, ignore it
    sys.exit(import_module(module).main(entrypoint=entrypoint))

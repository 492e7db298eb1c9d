"""Launchers, the fork servers of their workers, and other programs, forked from one process that has imported what they import:
torch takes each of them some seconds.

Where starting and dying are the subject, a launcher is started as people start it. What is forked has the parent, the session, the
environment and the open files that it would have. What only a new program takes from its environment it does not have: settings of
the C allocator, and what libraries read when they are loaded, so nothing that uses a GPU can be started so.
"""

import atexit
import contextlib
import ctypes
import fcntl
import functools
import inspect
import json
import os
import secrets
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from multiprocessing import util
from pathlib import Path
from typing import IO, Any, NoReturn

from bagualu.trainer.process.parent_death import die_with
from tests.leftovers import hold_mark
from tests.namespaces import Kind

_IMPORTED = (
    "bagualu.launch.cli", "bagualu.launch.verbs.train", "bagualu.launch.verbs.rehearse", "bagualu.launch.node",
    "bagualu.launch.workers.processes", "bagualu.launch.workers.worker_process", "bagualu.trainer.run", "tests.standing",
)  # fmt: skip
_ONLY_IN_SERVERS = "bagualu.launch.workers.fork_server_preload"
_SET_CHILD_SUBREAPER = 36
_LONGEST = 2**17
"""Bytes of a request: a program, words and an environment."""
_HIGH = 500
"""Files are moved out of the way of each other to numbers from here on."""
ROOT = Path(__file__).parents[2]


class Forked(subprocess.Popen[str]):
    """A Python program as a process and a session of its own; `words` are its arguments. `env` is marked (tests/leftovers.py)."""

    def __init__(
        self,
        program: str,
        words: Sequence[str],
        *,
        cwd: Path,
        env: Mapping[str, str],
        stdout: int | None = subprocess.PIPE,
        stderr: int | IO[str] | None = subprocess.PIPE,
    ) -> None:
        super().__init__([program, *words], text=True, cwd=cwd, env=env, stdout=stdout, stderr=stderr)

    def _execute_child(self, *given: Any) -> None:  # the one part of Popen that starts a process
        own = inspect.signature(super()._execute_child).bind(*given).arguments  # type: ignore[misc]
        pipes = [own[name] for name in ("p2cread", "c2pwrite", "errwrite")]
        files = {number: pipe if pipe >= 0 else number for number, pipe in enumerate(pipes)}
        program, *words = own["args"]
        self.pid = _fork(program, words, own["cwd"], own["env"], files)
        self._child_created = True
        self._close_pipe_fds(*(own[name] for name in inspect.signature(self._close_pipe_fds).parameters))  # type: ignore[attr-defined]


class Launcher(Forked):
    """`main(words, entrypoint)` of `module`."""

    def __init__(self, words: Sequence[str], entrypoint: str | None, module: str = "bagualu.launch.cli", **options: Any) -> None:
        super().__init__(f"import sys; from {module} import main; sys.exit(main(entrypoint={entrypoint!r}))", words, **options)


def run_as_root(
    module: str, words: Sequence[str], kind: Kind, env: Mapping[str, str], *paths: Path, timeout: float = 240
) -> subprocess.CompletedProcess[str]:
    """Runs `script(*words)` of `module` as root of a network, or of mounts, of its own. `paths`: where it finds more modules."""
    program = f"import sys; from tests.namespaces import become_root; become_root({kind!r}); "
    program += f"from {module} import script; script(*sys.argv[1:])"
    env = {**env, "PYTHONPATH": os.pathsep.join(map(str, (ROOT, *paths)))}
    with Forked(program, words, cwd=ROOT, env=env) as process:
        try:
            out, err = process.communicate(timeout=timeout)
        finally:
            process.kill()
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)


def _fork(program: str, words: Sequence[str], folder: Path, environment: Mapping[str, str], files: Mapping[int, int]) -> int:
    """A child of this process that runs `program`, with open files by their number there; its process id."""
    request = {
        "program": program, "words": list(words), "folder": str(folder), "environment": dict(environment), "numbers": list(files),
        "blocked": sorted(signal.pthread_sigmask(signal.SIG_BLOCK, [])),
    }  # fmt: skip
    address = _server()
    _adopt(True)  # a process whose parent has ended, which is what the server makes of it
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as server:
            server.connect(address)
            socket.send_fds(server, [json.dumps(request).encode()], list(files.values()))
            return int(server.recv(_LONGEST))
    finally:
        _adopt(False)


def _adopt(wanted: bool) -> None:
    if ctypes.CDLL(None).prctl(_SET_CHILD_SUBREAPER, int(wanted), 0, 0, 0):
        raise OSError("prctl(PR_SET_CHILD_SUBREAPER) failed")


_servers: dict[int, tuple[str, Any]] = {}
"""By the process that asks (a fork inherits those of its parent): where it asks, and the process there, if this one knows it."""


def _server() -> str:
    """Where the process is asked that launchers are forked from; it ends with this process."""
    if os.getpid() not in _servers:
        address = _new_address()
        program = f"from tests.launch.warm import serve; serve({address!r}, {os.getpid()})"
        server = subprocess.Popen(
            [sys.executable, "-c", program], stdout=subprocess.PIPE, start_new_session=True,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
        )  # fmt: skip
        assert server.stdout is not None
        assert server.stdout.readline()
        _servers[os.getpid()] = address, server
    return _servers[os.getpid()][0]


def fork_from_here() -> None:
    """What this process starts from now on is forked from what it is now, in the namespaces that it is in."""
    address, parent = _new_address(), os.getpid()
    told, tells = os.pipe()
    sys.stdout.flush()
    if os.fork() == 0:
        os.setsid()
        os.dup2(tells, sys.stdout.fileno())
        _let_go_of_files([])
        _end_with(functools.partial(serve, address, parent))
    os.close(tells)
    with os.fdopen(told) as pipe:
        assert pipe.readline()
    _servers[parent] = address, None


def _new_address() -> str:
    return f"\0bagualu-tests-{secrets.token_hex(8)}"


def _end_with(function: Callable[[], None]) -> NoReturn:
    """End this process as a program that calls `function` does, whatever it was forked in the middle of."""
    code = 0
    try:
        function()
    except SystemExit as ended:
        code = ended.code if isinstance(ended.code, int) else int(ended.code is not None)
    except BaseException:
        traceback.print_exc()
        code = 1
    with contextlib.suppress(OSError, ValueError):
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(code)


def serve(address: str, parent: int) -> None:
    """Fork what the process `parent` asks for, until it is gone."""
    die_with(parent)
    for module in _IMPORTED:
        import_module(module)
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as server:
        server.bind(address)
        server.listen()
        print("listens", flush=True)
        while True:
            asked, _ = server.accept()
            with asked:
                if _who(asked) != parent:
                    continue
                request, files, _, _ = socket.recv_fds(asked, _LONGEST, 3)
                told, tells = os.pipe()
                if (between := os.fork()) == 0:
                    between = os.getpid()
                    if os.fork():
                        os._exit(0)
                    os.setsid()
                    os.write(tells, str(os.getpid()).encode())
                    os.close(tells)
                    os.close(told)
                    break
                os.close(tells)
                os.waitpid(between, 0)
                with contextlib.suppress(OSError):  # whoever asked has given up
                    asked.send(os.read(told, 32))
                for file in (told, *files):
                    os.close(file)
    while (now := os.getppid()) != parent:
        if now != between:
            os._exit(1)
        time.sleep(0.001)
    _begin(files, **json.loads(request))


def _who(connected: socket.socket) -> int:
    """The process at the other end."""
    pid, _, _ = struct.unpack("3i", connected.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i")))
    return int(pid)


def _begin(
    files: list[int],
    program: str,
    words: list[str],
    folder: str,
    environment: dict[str, str],
    numbers: list[int],
    blocked: list[int],
) -> None:
    """Become what was asked for."""
    high = [fcntl.fcntl(file, fcntl.F_DUPFD, _HIGH) for file in files]
    for file in files:
        os.close(file)
    for number, file in zip(numbers, high, strict=True):
        os.dup2(file, number)
        os.close(file)
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    mark = hold_mark(environment)
    tempfile.tempdir = None  # by the environment
    sys.path[:1] = environment.get("PYTHONPATH", "").split(":")
    sys.argv = ["-c", *words]
    # What started the tests may have them, and what they start, ignore these: a shell Ctrl-C (`&`), nohup a hang-up.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_SETMASK, blocked)
    util.spawnv_passfds = functools.partial(_spawn, util.spawnv_passfds, mark)
    exec(program, {"__name__": "__main__"})


def _spawn(spawn: Any, mark: int, path: str, arguments: list[str], files: Sequence[int]) -> int:
    """Takes the place of multiprocessing.util.spawnv_passfds: forks the launcher, where that would start a new Python."""
    program = arguments[-1]
    if "multiprocessing.forkserver" not in program:
        return int(spawn(path, arguments, files))
    if pid := os.fork():
        return pid
    try:
        _let_go_of_files([*files, mark])
        sys.modules.pop(_ONLY_IN_SERVERS)
        exec(program, {"__name__": "__main__"})
    except SystemExit:
        os._exit(0)
    except BaseException:
        traceback.print_exc()
    os._exit(1)


def _let_go_of_files(kept: Sequence[int]) -> None:
    """What a new program would not have is closed. Its number stays taken: whatever still owns it here may close it at any time."""
    nothing = os.open(os.devnull, os.O_RDWR)
    for file in map(int, os.listdir("/proc/self/fd")):
        with contextlib.suppress(OSError):  # the list itself
            if file not in (*kept, nothing) and not os.get_inheritable(file):
                os.dup2(nothing, file, inheritable=False)

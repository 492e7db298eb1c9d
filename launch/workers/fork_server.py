"""Manages the fork server, the process that workers are forked from. It imports torch once, while the launcher prepares the run.

Signals that ask to stop are blocked in the server, and in every worker until the worker installs its handlers. So a Ctrl-C during
start-up stays pending instead of being lost or killing a worker half-way. The server dies with the launcher
(fork_server_preload.py).
"""

import multiprocessing
import os
import signal
from multiprocessing import forkserver, process, resource_tracker
from pathlib import Path

from bagualu.launch.workers import fork_server_preload
from bagualu.trainer.process.stop_request import STOP_SIGNALS


def start(modules: list[str], folder: Path) -> None:
    """Start the server, which begins to import `modules`, and return immediately. The environment variables of the workers must be
    set before. `folder` is the launch's scratch folder.

    Call this and `running` on the main thread: the server dies with the thread that starts it.
    """
    multiprocessing.get_context("forkserver").set_forkserver_preload([fork_server_preload.__name__, *modules])
    running(folder)


def running(folder: Path) -> int:
    """Returns the server's process id, starting the server if it is not running. The server's socket is in
    `folder`."""
    config: dict[str, str] = process.current_process()._config  # type: ignore[attr-defined]
    resource_tracker.ensure_running()  # before the signals are blocked, because starting it unblocks them
    signals = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    os.environ[fork_server_preload.LAUNCHER] = str(os.getpid())
    before, config["tempdir"] = config.get("tempdir"), str(folder)  # by default a folder in /tmp, which a kill -9 leaves behind
    try:
        forkserver.ensure_running()
    finally:
        config.pop("tempdir") if before is None else config.update(tempdir=before)
        del os.environ[fork_server_preload.LAUNCHER]
        signal.pthread_sigmask(signal.SIG_SETMASK, signals)
    pid: int = forkserver._forkserver._forkserver_pid  # type: ignore[attr-defined]
    return pid


def stop() -> None:
    """Kill the server, so that the next run starts one with its own environment. Call it when no worker is left.

    A clean exit of the server would spend most of a second on unloading torch.
    """
    if (pid := forkserver._forkserver._forkserver_pid) is not None:  # type: ignore[attr-defined]
        os.kill(pid, signal.SIGKILL)
    forkserver._forkserver._stop()  # type: ignore[attr-defined]

"""The process that workers are forked from: it imports torch once, for all of them, while the launcher does other things.

Free of torch. Signals that ask to stop are blocked in it, and so in every worker until the worker has said what they mean
to it: a Ctrl-C during start-up is kept, not lost, and kills nobody half-way. It dies with the launcher (lifeline.py).
"""

import multiprocessing
import os
import signal
from multiprocessing import forkserver, process, resource_tracker
from pathlib import Path

from bagualu.launch.workers import fork_server_preload
from bagualu.trainer.process.stop_request import STOP_SIGNALS


def start(modules: list[str], folder: Path) -> None:
    """Begin importing `modules` in the server; returns at once. Environment variables must be set before.

    To be called on the main thread, as `running` is: the server dies with the thread that starts it.
    """
    multiprocessing.get_context("forkserver").set_forkserver_preload([fork_server_preload.__name__, *modules])
    running(folder)


def running(folder: Path) -> int:
    """The server's process id. It is started where it is not there, or not any more; `folder` is where its socket lies."""
    config: dict[str, str] = process.current_process()._config  # type: ignore[attr-defined]
    resource_tracker.ensure_running()  # by itself, because it ends with these signals unblocked
    signals = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    os.environ[fork_server_preload.LAUNCHER] = str(os.getpid())
    before, config["tempdir"] = config.get("tempdir"), str(folder)  # else a folder in /tmp that stays after a kill -9
    try:
        forkserver.ensure_running()
    finally:
        config.pop("tempdir") if before is None else config.update(tempdir=before)
        del os.environ[fork_server_preload.LAUNCHER]
        signal.pthread_sigmask(signal.SIG_SETMASK, signals)
    pid: int = forkserver._forkserver._forkserver_pid  # type: ignore[attr-defined]
    return pid


def stop() -> None:
    """End the server, so that the next one starts with another environment. No worker is left; to let it put torch away by itself
    takes most of a second."""
    if (pid := forkserver._forkserver._forkserver_pid) is not None:  # type: ignore[attr-defined]
        os.kill(pid, signal.SIGKILL)
    forkserver._forkserver._stop()  # type: ignore[attr-defined]

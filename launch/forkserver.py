"""The process that workers are forked from: it imports torch once, for all of them, while the launcher does other things.

Free of torch. Signals that ask to stop are blocked in it, and so in every worker until the worker has said what they mean
to it: a Ctrl-C during start-up is kept, not lost, and kills nobody half-way.
"""

import multiprocessing
import signal
from multiprocessing import forkserver, resource_tracker

from bagualu.trainer.stopping import STOP_SIGNALS


def start(modules: list[str]) -> None:
    """Begin importing `modules` in the server; returns at once. Environment variables must be set before."""
    multiprocessing.get_context("forkserver").set_forkserver_preload(modules)
    resource_tracker.ensure_running()  # by itself, because it ends with these signals unblocked
    before = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    try:
        forkserver.ensure_running()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def stop() -> None:
    """End the server, so that the next one starts with another environment."""
    forkserver._forkserver._stop()  # type: ignore[attr-defined]

"""Requests to stop a run: a signal sets a flag, which is polled in every step; a second Ctrl-C raises KeyboardInterrupt."""

import contextlib
import os
import signal
from types import FrameType

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1)


_NOTICE = b"asked to stop: will save after this step; not saved yet\n"


class StopRequest:
    """Calling this object returns whether this process was asked to stop.

    A notice is written as soon as the first signal arrives. If no "saved" follows it in a log, the steps since the last checkpoint
    are lost.
    """

    def __init__(self) -> None:
        self.asked = False
        self.tell: list[int] = [2]
        """The file descriptors to which the notice is written; empty: no notice."""
        self._interrupted = False

    def __call__(self) -> bool:
        return self.asked

    def install(self) -> None:
        """Handles the stop signals from now on, and those that arrived while they were blocked: they only set the flag, but a
        second Ctrl-C raises KeyboardInterrupt. A signal that the process ignores stays ignored."""
        for number in STOP_SIGNALS:
            if signal.getsignal(number) is not signal.SIG_IGN:  # e.g. SIGHUP under nohup
                signal.signal(number, self._ask)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)

    def _ask(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and self._interrupted:
            raise KeyboardInterrupt
        self._interrupted |= number == signal.SIGINT
        if not self.asked:
            self.asked = True
            for descriptor in self.tell:
                with contextlib.suppress(OSError):  # the terminal was closed
                    os.write(descriptor, _NOTICE)  # not to a stream: the signal may have interrupted a write to it

"""Being asked to stop: a signal sets a flag, the loop polls it at the end of a step; a second Ctrl-C ends it at once.

Free of torch.
"""

import contextlib
import os
import signal
from types import FrameType

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1)


_NOTICE = b"asked to stop: will save after this step; not saved yet\n"


class StopRequest:
    """Whether this process was asked to stop. Call it to know.

    It says so at once, so that a log in which no "saved" follows tells what was lost.
    """

    def __init__(self) -> None:
        self.asked = False
        self.tell: list[int] = [2]
        """Descriptors to say it to."""
        self._interrupted = False

    def __call__(self) -> bool:
        return self.asked

    def install(self) -> None:
        """From now on the stop signals only set the flag; those that came while they were blocked count too."""
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
                with contextlib.suppress(OSError):  # a terminal that has gone
                    os.write(descriptor, _NOTICE)  # no stream: the signal may have come in the middle of a write to one

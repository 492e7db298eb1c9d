"""Being asked to stop: a signal sets a flag, the loop polls it at the end of a step; a second Ctrl-C ends it at once.

Free of torch.
"""

import signal
from types import FrameType

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1)


class StopRequest:
    """Whether this process was asked to stop. Call it to know."""

    def __init__(self) -> None:
        self.asked = False
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
        self.asked = True

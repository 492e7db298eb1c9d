"""A process made slow: stopped and let go on again, in turns too short for anybody to call it hung. Free of torch."""

import os
import signal
import threading
import time
from types import TracebackType

PERIOD_SECONDS = 0.02


class Slowed:
    """Inside, `process` runs only for the share `speed` of every period; afterwards it goes on as before, whatever happens here."""

    def __init__(self, process: int, speed: float, period_seconds: float = PERIOD_SECONDS) -> None:
        self._process, self._runs, self._stands = process, speed * period_seconds, (1 - speed) * period_seconds
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._work, name="duty", daemon=True)

    def __enter__(self) -> "Slowed":
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._over.set()
        self._thread.join()

    def _work(self) -> None:
        try:
            while not self._over.is_set():
                os.kill(self._process, signal.SIGSTOP)
                time.sleep(self._stands)
                os.kill(self._process, signal.SIGCONT)
                time.sleep(self._runs)
        except ProcessLookupError:
            return  # it has ended

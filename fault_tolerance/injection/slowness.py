"""Slows a rank down like a throttled processor."""

import time


class Slowness:
    """Observes the monitor and, until step `until` begins, sleeps `factor` - 1 times as long as the rank has just computed."""

    def __init__(self, until: int, factor: float) -> None:
        self.until, self.factor = until, factor
        self._since = time.monotonic()
        self._over = False

    def at(self, point: str, step: int) -> None:
        self._over = step >= self.until
        self._lag()

    def waits(self, what: str | None) -> None:
        if what is not None:
            self._lag()
        self._since = time.monotonic()  # waiting is not work

    def _lag(self) -> None:
        if not self._over:
            time.sleep((self.factor - 1) * (time.monotonic() - self._since))
        self._since = time.monotonic()

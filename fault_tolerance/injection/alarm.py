"""A stopped process that goes on by itself: a timer of the kernel whose signal is SIGCONT. Linux only; free of torch."""

import ctypes
import signal
import time

_SIGEV_SIGNAL = 0


class _Event(ctypes.Structure):
    """struct sigevent: 64 bytes, of which the first three fields matter here."""

    _fields_ = (("value", ctypes.c_void_p), ("signal", ctypes.c_int), ("notify", ctypes.c_int), ("rest", ctypes.c_byte * 48))


class _Times(ctypes.Structure):
    """struct itimerspec: how often it goes off again, and when first."""

    _fields_ = tuple((name, ctypes.c_long) for name in ("again_seconds", "again_nanoseconds", "seconds", "nanoseconds"))


def continue_after(seconds: float) -> None:
    """Send SIGCONT to this process after `seconds`, whether it is stopped then or not. Raises OSError."""
    library, timer = ctypes.CDLL(None, use_errno=True), ctypes.c_void_p()
    event = _Event(None, signal.SIGCONT, _SIGEV_SIGNAL)
    times = _Times(0, 0, int(seconds), max(1, int(seconds % 1 * 1e9)))
    if library.timer_create(time.CLOCK_MONOTONIC, ctypes.byref(event), ctypes.byref(timer)):
        raise OSError(ctypes.get_errno(), "timer_create")
    if library.timer_settime(timer, 0, ctypes.byref(times), None):
        raise OSError(ctypes.get_errno(), "timer_settime")

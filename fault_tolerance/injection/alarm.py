"""Continues a stopped process with a kernel timer whose signal is SIGCONT. Linux only."""

import ctypes
import signal
import time

_SIGEV_SIGNAL = 0


class _Event(ctypes.Structure):
    """struct sigevent: 64 bytes, of which only the first three fields are used here."""

    _fields_ = (("value", ctypes.c_void_p), ("signal", ctypes.c_int), ("notify", ctypes.c_int), ("rest", ctypes.c_byte * 48))


class _Times(ctypes.Structure):
    """struct itimerspec: the interval of repetitions and the time of the first signal."""

    _fields_ = tuple((name, ctypes.c_long) for name in ("again_seconds", "again_nanoseconds", "seconds", "nanoseconds"))


def continue_after(seconds: float) -> None:
    """Sends SIGCONT to this process after `seconds`, whether it is stopped or not. Raises OSError."""
    library, timer = ctypes.CDLL(None, use_errno=True), ctypes.c_void_p()
    event = _Event(None, signal.SIGCONT, _SIGEV_SIGNAL)
    times = _Times(0, 0, int(seconds), max(1, int(seconds % 1 * 1e9)))
    if library.timer_create(time.CLOCK_MONOTONIC, ctypes.byref(event), ctypes.byref(timer)):
        raise OSError(ctypes.get_errno(), "timer_create")
    if library.timer_settime(timer, 0, ctypes.byref(times), None):
        raise OSError(ctypes.get_errno(), "timer_settime")

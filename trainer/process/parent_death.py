"""Ties this process to its parent: the kernel kills it when the parent has ended, in whatever way.

No code of this process has to run for that. So it also ends a stopped process, and one that never releases Python's global lock.
"""

import ctypes
import os
import signal
import sys

_PR_SET_PDEATHSIG = 1
"""The option of prctl(2) that chooses the signal for this process when its parent ends."""


def die_with(parent: int) -> None:
    """Makes the kernel kill this process when its parent ends; kills it immediately if its parent is no longer the process
    `parent`.

    The kernel watches the parent's thread that started this process, so that thread must live as long as the parent. The setting
    survives exec, but children do not inherit it. Does nothing on systems other than Linux. Raises OSError if the kernel refuses.
    """
    if sys.platform != "linux":
        return
    if ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL):
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG)")
    if os.getppid() != parent:  # it died before the kernel knew
        os.kill(os.getpid(), signal.SIGKILL)

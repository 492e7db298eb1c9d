"""Ties this process to the one that has started it: the kernel ends it when that one is gone, however that went.

Free of torch. Nothing has to run here for it, so it ends a stopped process too, and one that never gives Python's lock back.
"""

import ctypes
import os
import signal
import sys

_PR_SET_PDEATHSIG = 1
"""Of prctl(2)."""


def die_with(parent: int) -> None:
    """From now on this process is killed when its parent is dead; at once when that is not (any more) the process `parent`.

    The kernel means the parent's thread that has started this process, so that must be one that lives as long as all. Goes over to
    another program with exec, not to children. Only Linux has it: elsewhere this does nothing.
    """
    if sys.platform != "linux":
        return
    if ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL):
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG)")
    if os.getppid() != parent:  # it died before the kernel knew
        os.kill(os.getpid(), signal.SIGKILL)

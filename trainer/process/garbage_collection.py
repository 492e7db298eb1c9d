"""The first import of torch without Python's garbage collector. Free of torch.

It makes a quarter of a million objects that all stay. The collector goes through them again and again meanwhile, and once more when
the process ends: a quarter of the processor time of a process that only imports torch and ends.
"""

import gc
import sys
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def uncollected() -> Iterator[None]:
    """The collector waits while there are imports inside, and never looks at what the process has by their end.

    Does nothing where torch is imported already, or the collector is off.
    """
    if "torch" in sys.modules or not gc.isenabled():
        yield
        return
    gc.disable()
    try:
        yield
    finally:
        leave_out_what_is_there()


def leave_out_what_is_there() -> None:
    """Turn the collector on, for what is made from now on."""
    gc.freeze()
    gc.enable()

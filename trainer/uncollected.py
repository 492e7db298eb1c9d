"""The first import of torch without Python's garbage collector. Free of torch.

It makes a quarter of a million objects that all stay. The collector goes through them again and again meanwhile, and once more when
the process ends: together a quarter of the import's time, and of the time that the exit takes.
"""

import gc
import sys
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def uncollected() -> Iterator[None]:
    """Imports inside are not interrupted, and what they make is not looked at afterwards. Does nothing where torch is there."""
    if "torch" in sys.modules or not gc.isenabled():
        yield
        return
    gc.disable()
    try:
        yield
    finally:
        settled()


def settled() -> None:
    """All that there is now stays: the collector, running again, leaves it out."""
    gc.freeze()
    gc.enable()

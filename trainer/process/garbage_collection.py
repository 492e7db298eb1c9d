"""Turns Python's garbage collector off during the first import of torch.

The import creates a quarter of a million permanent objects. The collector would traverse them repeatedly during the import, and
once more when the process ends: a quarter of the processor time of a process that only imports torch.
"""

import gc
import sys
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def uncollected() -> Iterator[None]:
    """Turns the collector off inside this context, which imports torch. Afterwards the collector is on again, but never examines
    the objects that exist by then.

    Does nothing if torch is imported already or the collector is off.
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
    """Turns the collector on for objects that are created from now on; it never examines those that exist now."""
    gc.freeze()
    gc.enable()

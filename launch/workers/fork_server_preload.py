"""Imported by the fork server before all else, and by nobody else: ties it to the launcher, but not to its terminal. Free of torch.

What a terminal or `timeout` sends to the launcher's process group is for the launcher, which tells the workers. Their own
children (a compiler) know nothing of requests to stop and would die of one, and the worker with them: so the server, and all
that comes of it, is a session of its own.

The server has no code of ours but what it imports; that is without the garbage collector, which each worker turns on (member.py).
Tying the workers to the server alone would not do: each holds the pipe by whose end the server knows that it is of no more use.
"""

import gc
import os

from bagualu.trainer.output import streams
from bagualu.trainer.process.parent_death import die_with

LAUNCHER = "BAGUALU_LAUNCHER"
"""Process id of the launcher, in the environment of a starting fork server only."""

if LAUNCHER in os.environ:
    os.setsid()
    die_with(int(os.environ.pop(LAUNCHER)))
    gc.disable()
    streams.secure()  # of the server and of all workers, before a library prints while it is imported

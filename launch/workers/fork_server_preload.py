"""The first module that the fork server imports: it makes the server die with the launcher and detaches it from the terminal.

A signal that a terminal or `timeout` sends to the launcher's process group is meant for the launcher, which asks the workers to
stop. Children of workers (a compiler) would die of such a signal and take their worker with them. So the server and all its
descendants are in a session of their own.

Importing this module is the only way to run our code in the server. It also turns the garbage collector off during the imports;
each worker turns it on again (worker_process.py). Without this module, the server would not end when the launcher dies, because it
waits for the end of a pipe that every worker holds open.
"""

import gc
import os

from bagualu.trainer.output import streams
from bagualu.trainer.process.parent_death import die_with

LAUNCHER = "BAGUALU_LAUNCHER"
"""Environment variable with the launcher's process id, set only while the fork server starts."""

if LAUNCHER in os.environ:
    os.setsid()
    die_with(int(os.environ.pop(LAUNCHER)))
    gc.disable()
    streams.secure()  # for the server and all workers, before an import prints something

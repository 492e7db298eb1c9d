"""Imported by the fork server before all else, and by nobody else: ties it to the launcher. Free of torch.

The server has no code of ours but what it imports. Tying the workers to the server alone would not do: each holds the pipe by
whose end the server knows that it is of no more use.
"""

import os

from bagualu.trainer.parent import die_with

LAUNCHER = "BAGUALU_LAUNCHER"
"""Process id of the launcher, in the environment of a starting fork server only."""

if LAUNCHER in os.environ:
    die_with(int(os.environ.pop(LAUNCHER)))

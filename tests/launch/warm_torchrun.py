"""torchrun in a process that has imported torch already, and so have its workers: torch takes each of them some seconds.

Not collected by pytest. All but the start of a process is torchrun's own. A worker does not start itself again with another
environment (trainer/__main__.py): what it was forked from is no program of its own.
"""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch.distributed import run
from torch.distributed.elastic.multiprocessing.subprocess_handler import SubprocessHandler

from bagualu.trainer.__main__ import _PREPARED
from tests.launch.warm import Forked, fork_from_here


def main(words: list[str]) -> None:
    SubprocessHandler._popen = _fork  # type: ignore[method-assign]
    os.environ[_PREPARED] = "1"
    fork_from_here()
    run.main(words)


def _fork(handler: SubprocessHandler, command: Sequence[str], env: dict[str, str]) -> Any:
    _, _, script, *words = command  # python -u SCRIPT WORD...
    return Forked(Path(script).read_text(), words, cwd=Path.cwd(), env=env, stdout=None, stderr=None)

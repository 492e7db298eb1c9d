"""The secret that the agents of a job share, and the signatures that they make with it. Free of torch.

It comes from the environment variable BAGUALU_SECRET, which the script of `bagualu slurm` sets, or else from the file `.secret` in
the run directory, which the first agent makes, readable by its user alone. It is never an argument and never printed.
"""

import hashlib
import hmac
import os
import secrets
import stat
import sys
import time
from pathlib import Path

from bagualu.comm.errors import RecipeError

VARIABLE, FILE = "BAGUALU_SECRET", ".secret"
_LEAST = 16
"""Characters of a secret."""
_CHARACTERS = 64
"""Of one that is made here."""
_WRITE_SECONDS = 10
"""For the agent that makes the file to fill it."""


def of_the_job(run_dir: Path) -> str:
    """The secret that all agents of the job in `run_dir` have. Raises RecipeError when it is none, or readable by others."""
    given = os.environ.pop(VARIABLE, None)  # what this process starts has no use for it
    if given is None:
        return _from_file(run_dir / FILE)
    if len(given) < _LEAST:
        raise RecipeError(f"{VARIABLE} has {len(given)} characters; give at least {_LEAST}, the same on all nodes, e.g. "
                          f"export {VARIABLE}=$(openssl rand -hex 32), or leave it out")  # fmt: skip
    return given


def of_this_process() -> str:
    """The secret of a run with a single agent."""
    return secrets.token_hex(_CHARACTERS // 2)


def _from_file(path: Path) -> str:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    except OSError as error:
        if path.exists():
            return _read(path)
        raise RecipeError(f"{path} cannot be written ({error.strerror}); make run.dir writable or export {VARIABLE}") from error
    with os.fdopen(descriptor, "w") as file:
        secret = of_this_process()
        file.write(secret)
        file.flush()
        os.fsync(descriptor)  # other nodes read it
    return secret


def _read(path: Path) -> str:
    deadline = time.monotonic() + _WRITE_SECONDS
    try:
        about = path.stat()
        if about.st_uid != os.geteuid() or stat.S_IMODE(about.st_mode) & 0o077:
            raise RecipeError(f"{path} is the secret of the job's agents, but other users can read or own it; remove it, and it is "
                              f"made anew")  # fmt: skip
        while len(secret := path.read_text(encoding="ascii", errors="replace")) < _CHARACTERS:
            if time.monotonic() > deadline:
                raise RecipeError(f"{path} holds {len(secret)} of {_CHARACTERS} characters; remove it, and it is made anew")
            time.sleep(0.05)
    except OSError as error:
        raise RecipeError(f"{path} cannot be read ({error.strerror}); remove it, and it is made anew") from error
    return secret


class Seal:
    """Signs what the agents of one run write into their store, and knows what another agent has signed."""

    def __init__(self, secret: str, run: str) -> None:
        """`run`: the run's own name, so that nothing signed for another run of the job is taken."""
        self._key = hashlib.sha256(f"{run}\0{secret}".encode()).digest()
        self._complained: set[str] = set()

    def sign(self, name: str, text: str) -> str:
        """`text`, which is to be stored under `name`, with its signature."""
        return f"{self._signature(name, text)} {text}"

    def opened(self, name: str, value: bytes) -> str | None:
        """What was signed; None, and one line on stderr, for a value that no agent of this run has stored under `name`."""
        signature, _, text = value.decode(errors="replace").partition(" ")
        if hmac.compare_digest(signature.encode(), self._signature(name, text).encode()):
            return text
        if name not in self._complained:
            self._complained.add(name)
            cause = f"ignored what the rendezvous store holds under {name!r}: it is not signed with this job's secret"
            advice = f"if it is another node's, give all nodes the same {VARIABLE}, or none"
            print(f"bagualu: {cause}; {advice}", file=sys.stderr, flush=True)
        return None

    def _signature(self, name: str, text: str) -> str:
        return hmac.new(self._key, f"{name}\0{text}".encode(), hashlib.sha256).hexdigest()

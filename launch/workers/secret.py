"""The secret that the agents of a job share, and the signatures that they make with it.

The secret comes from the environment variable BAGUALU_SECRET, which the script of `bagualu slurm` sets, or else from the file
`.secret` in the run directory, which the first agent creates, readable by its user alone. It is never passed as an argument and
never printed.
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
from bagualu.fault_tolerance.run_directory import RunDirectory

VARIABLE = "BAGUALU_SECRET"
_LEAST = 16
"""Least number of characters of a secret that the user gives."""
_CHARACTERS = 64
"""Number of characters of a generated secret."""
_WRITE_SECONDS = 10
"""How long the agent that creates the file may take to fill it."""


def of_the_job(run_dir: Path) -> str:
    """Returns the secret shared by all agents of the job in `run_dir`.

    Raises RecipeError when the secret in the environment is too short, or when the secret's file is incomplete, belongs to or can
    be read by other users, or cannot be read or written.
    """
    given = os.environ.pop(VARIABLE, None)  # removed, because child processes do not need it
    if given is None:
        return _from_file(RunDirectory(run_dir).secret)
    if len(given) < _LEAST:
        raise RecipeError(f"{VARIABLE} has {len(given)} characters; give at least {_LEAST}, the same on all nodes, e.g. "
                          f"export {VARIABLE}=$(openssl rand -hex 32), or leave it out")  # fmt: skip
    return given


def of_this_process() -> str:
    """Returns a new random secret, for a run with a single agent."""
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
            raise RecipeError(f"{path} is the secret of the job's agents, but other users can read or own it; remove it and start "
                              f"again: a new one is made")  # fmt: skip
        while len(secret := path.read_text(encoding="ascii", errors="replace")) < _CHARACTERS:
            if time.monotonic() > deadline:
                raise RecipeError(
                    f"{path} holds {len(secret)} of {_CHARACTERS} characters; remove it and start again: a new one is made"
                )
            time.sleep(0.05)
    except OSError as error:
        raise RecipeError(f"{path} cannot be read ({error.strerror}); remove it and start again: a new one is made") from error
    return secret


class Seal:
    """Signs the values that an agent of a run writes into the agents' store, and verifies the values that other agents wrote."""

    def __init__(self, secret: str, run: str) -> None:
        """`run` is the run's id: a value that was signed for another run of the same job is not valid here."""
        self._key = hashlib.sha256(f"{run}\0{secret}".encode()).digest()
        self._complained: set[str] = set()

    def sign(self, name: str, text: str) -> str:
        """Returns one string of the signature and `text`, to be stored under `name`; the signature is valid only for that name."""
        return f"{self._signature(name, text)} {text}"

    def opened(self, name: str, value: bytes) -> str | None:
        """Returns the text of a signed value.

        Returns None if no agent of this run has signed the value for `name`, and prints that on stderr once per name.
        """
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

"""Checks the syntax of the shell lines of launch.slurm.setup and writes the part of the batch script that runs them."""

import re
import shlex
import shutil
import subprocess
from collections.abc import Sequence

from bagualu.comm.errors import RecipeError

_UNFINISHED = re.compile(r"unexpected end of file|unexpected EOF while looking for|delimited by end-of-file")
"""Pattern of bash's error messages for a command that may continue on the next line."""


def check(lines: Sequence[str]) -> None:
    """Parses the lines with `bash -n`, which does not run them. Raises RecipeError for a line that bash cannot parse."""
    refusal = _parsed(lines)[1]
    if refusal:
        raise RecipeError(refusal)


def commands(lines: Sequence[str]) -> list[str]:
    """Returns the lines joined into whole commands: a function, a loop or a quoted string may take several lines."""
    return _parsed(lines)[0]


def _parsed(lines: Sequence[str]) -> tuple[list[str], str]:
    """Returns the lines joined into whole commands, and the error message if a line cannot be parsed, else "". Without bash on this
    machine, all lines are one command and nothing is checked."""
    bash = shutil.which("bash")
    if bash is None:
        return ["\n".join(lines)] if lines else [], ""
    whole: list[str] = []
    open_lines: list[str] = []
    unfinished = refusal = ""
    for line in lines:
        open_lines.append(line)
        complaint = _complaint(bash, "\n".join(open_lines))
        if not complaint and not _continued(line):
            whole.append("\n".join(open_lines))
            open_lines, refusal = [], ""
        elif complaint and not _UNFINISHED.search(complaint):
            refusal = refusal or _refusal(line, complaint)  # a later line may still make it valid, as after `[[ a`
        else:
            unfinished = complaint or "it ends with a backslash, but no line follows"
    if open_lines:
        return [*whole, "\n".join(open_lines)], refusal or _refusal(open_lines[0], unfinished)
    return whole, ""


def shell(lines: Sequence[str]) -> str:
    """Returns the part of the batch script's function `agent` that runs the lines, "" if there are no lines.

    Each command runs by `eval` in the agent's shell, so it may define functions and variables and set options for later commands.
    A command that fails, or ends the shell, ends the job (`setup_failed` in job.sh).
    """
    whole = commands(lines)
    runs = [f'    setup={shlex.quote(command)}; eval "$setup" || setup_failed $?\n' for command in whole]
    return "".join(["    trap 'setup_failed $?' EXIT\n", *runs, "    trap - EXIT\n"]) if whole else ""


def _complaint(bash: str, text: str) -> str:
    """Returns bash's first error for `text`, without bash's name and the line number; "" if bash can parse the text."""
    done = subprocess.run(
        [bash, "--norc", "-O", "extglob", "-n"],
        input=text + "\n",
        capture_output=True,
        text=True,
        env={"LC_ALL": "C"},
    )
    said = done.stderr.strip().splitlines() or (["it cannot be parsed"] if done.returncode else [])
    return re.sub(r"^.*?line \d+: ", "", said[0]) if said else ""


def _continued(line: str) -> bool:
    return (len(line) - len(line.rstrip("\\"))) % 2 == 1


def _refusal(line: str, complaint: str) -> str:
    return f"launch.slurm.setup: bash cannot parse {line!r}: {complaint}; correct the line"

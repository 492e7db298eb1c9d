"""What a run goes on from: the newest state that is whole for every rank, and what is said of those that are not.

Candidates are tried newest first. Each is read and verified by all ranks before anything of the run changes (state.py); if one
rank finds damage, all take the next. A damaged checkpoint that the run has gone back behind is renamed, never deleted: under its
old name it would stand in the way of the same step when the run comes to it again (a committed step is never overwritten), it
would be tried first, and read in vain, at every restart, and retention would have to know of it. `mv` undoes it.
"""

import hashlib
import json
import logging
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol

from bagualu.comm.errors import RecipeError
from bagualu.fault_tolerance.checkpoint.damaged import set_aside
from bagualu.fault_tolerance.checkpoint.directory import list_checkpoints
from bagualu.fault_tolerance.checkpoint.exchange import broadcast_json, gather_json
from bagualu.fault_tolerance.checkpoint.format import CheckpointError, step_of
from bagualu.fault_tolerance.checkpoint.load import Checkpoint
from bagualu.trainer.assemble import Parts
from bagualu.trainer.config import Recipe
from bagualu.trainer.outcome import FinalError
from bagualu.trainer.state import CHECKPOINTS, take_state

log = logging.getLogger(__name__)


class Candidate(Protocol):
    """A state that a run may go on from. Every rank has the same ones, by step and name, wherever they lie."""

    @property
    def step(self) -> int: ...

    @property
    def name(self) -> str:
        """For people and for comparing ranks, e.g. "step-00000010" or "replica of step 12"."""
        ...

    def open(self) -> Checkpoint:
        """Called on every rank, so it may be collective. Raises CheckpointError: the next candidate is tried."""
        ...


@dataclass(frozen=True)
class Stored:
    """A committed checkpoint in the run directory."""

    path: Path

    @property
    def step(self) -> int:
        step = step_of(self.path)
        assert step is not None
        return step

    @property
    def name(self) -> str:
        return self.path.name

    def open(self) -> Checkpoint:
        return Checkpoint(self.path)


class NothingWholeError(CheckpointError, FinalError):
    """There are states and none can be used. It would be so at every start, so there is none."""


@dataclass(frozen=True)
class Resumed:
    """Where the run goes on."""

    step: int = 0
    """Steps already done."""
    checkpoint: Path | None = None
    """The newest checkpoint of the run directory that is not known to be damaged."""
    source: str | None = None
    """The candidate that was taken, by name."""
    damaged: list[dict[str, Any]] = field(default_factory=list)
    """What was tried in vain, newest first: {"checkpoint", "problem" (rank, file, byte), "used" instead, "set_aside" as}."""


def resume(parts: Parts, others: Sequence[Candidate] = ()) -> Resumed:
    """Take the newest whole state where the recipe asks to resume and there is one. Collective.

    `others` are candidates beside the checkpoints of the run directory; of two of the same step they are tried first.
    Raises RecipeError for a rank with another recipe, other data or another disk, NothingWholeError when none is.
    """
    stored = list_checkpoints(Path(parts.recipe.run.dir) / CHECKPOINTS) if parts.recipe.checkpoint.resume else []
    candidates = sorted([*others, *map(Stored, stored)], key=lambda candidate: -candidate.step)
    _require_same(parts, candidates)
    if not candidates:
        return Resumed()
    chosen, problems = choose(parts, candidates)
    whole = [path for path in stored if path.name not in problems]
    newest = whole[-1] if whole else None
    return Resumed(chosen.step, newest, chosen.name, tell(parts, candidates, problems, chosen.name))


def choose(parts: Parts, candidates: Sequence[Candidate]) -> tuple[Candidate, dict[str, str]]:
    """Take the state of the first candidate that is whole for every rank; which one, and by name what is wrong with those before.

    Collective. Raises NothingWholeError, with nothing changed, when none is whole.
    """
    problems: dict[str, str] = {}
    for candidate in candidates:
        try:
            take_state(parts, candidate.open)
        except CheckpointError as error:
            problems[candidate.name] = str(error)
        else:
            return candidate, problems
    root = Path(parts.recipe.run.dir) / CHECKPOINTS
    told = "; ".join(f"{name}: {_short(problem, root / name)}" for name, problem in problems.items())
    raise NothingWholeError(
        f"none of the {len(problems)} states of {parts.recipe.run.dir} can be used ({told}); restore one of them from a copy, "
        "or start anew with another run.dir"
    )


def _short(problem: str, checkpoint: Path) -> str:
    """What is wrong with it, without its place and without the remedy."""
    return problem.replace(f"{checkpoint}: ", "").replace(f"{checkpoint}/", "").split("; ")[0]


def _require_same(parts: Parts, candidates: Sequence[Candidate]) -> None:
    """A rank that reads another recipe, other data or another disk is refused by name rather than trained with."""
    names = ", ".join(candidate.name for candidate in candidates) or "none"
    own = {"another recipe": _digest(parts.recipe), "other data": parts.corpus.fingerprint, "other checkpoints": names}
    seen = gather_json(own, parts.mesh.group("world"), parts.device)
    for rank, other in enumerate(seen):
        for what, value in other.items():
            if value != seen[0][what]:
                raise RecipeError(
                    f"rank {rank} has {what} than rank 0 ({value} and {seen[0][what]}); give every rank the same recipe, "
                    f"data.source, Python version and a run.dir on a disk that all nodes share"
                )


def tell(parts: Parts, candidates: Sequence[Candidate], problems: dict[str, str], used: str) -> list[dict[str, Any]]:
    """Rename the damaged ones and say so, once: `Resumed.damaged`. Collective; the same on every rank."""
    if not problems:
        return []
    entries = []
    if parts.mesh.at("world") == 0:
        for candidate in candidates[: len(problems)]:
            moved = _set_aside(candidate.path) if isinstance(candidate, Stored) else None
            problem = problems[candidate.name]
            log.warning("%s cannot be used: %s. Going on from %s", candidate.name, problem, used)
            if moved:
                log.warning("%s is now called %s", candidate.name, moved)
            entries.append({"checkpoint": candidate.name, "problem": problem, "used": used, "set_aside": moved})
    told: list[dict[str, Any]] = broadcast_json(entries, parts.mesh.group("world"), parts.device)
    return told


def _set_aside(path: Path) -> str | None:
    try:
        return set_aside(path).name
    except OSError as error:  # what is whole can be read; saving this step again will say what is in the way
        log.warning("%s cannot be renamed (%s)", path, error.strerror)
        return None


def _digest(recipe: Recipe) -> str:
    return hashlib.blake2b(json.dumps(asdict(recipe), sort_keys=True).encode(), digest_size=8).hexdigest()

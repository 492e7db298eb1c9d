"""Parses `faults` of a recipe.

faults=[kill@step=5:rank=2:at=backward, corrupt@step=9]     these faults
faults=random:20                                            20 faults, drawn with run.seed
faults=random:20:kill+slow                                  20 faults of these kinds
"""

import math
import random
from dataclasses import dataclass, fields
from typing import Any, get_type_hints

from bagualu.comm.errors import RecipeError
from bagualu.comm.monitor import Phase
from bagualu.fault_tolerance.injection.fault import Fault
from bagualu.fault_tolerance.injection.kinds import KINDS

EXAMPLE = "faults=[kill@step=5:rank=2:at=backward]"
DRAWN = ("kill", "exception", "stop", "slow", "corrupt", "full_disk", "nan", "drop_link")
"""The kinds of faults that random:COUNT draws: those after which every recipe quickly continues with the same bits. flip is not
among them: its outcome depends on the guard's next check."""
_STOPPED_SECONDS = 0.5
"""Seconds of a drawn stop, too short for the watchdog to take it for a hang."""
_AGAINST_CHECKPOINTS = ("corrupt", "full_disk")
_IN_EVERY_STEP = (Phase.DATA, Phase.FORWARD, Phase.BACKWARD, Phase.REDUCE, Phase.AGREE, Phase.OPTIMIZER)
_TYPE_NAMES = {int: "an integer", float: "a number", str: "a word"}


@dataclass(frozen=True)
class Setting:
    """The run for which a plan is made."""

    seed: int
    steps: int
    ranks: int
    checkpoint_every: int
    retries: bool = True
    """Whether a step with non-finite values is computed again. If not, no "nan" is drawn by default, because it would cost the
    step's samples or end the run."""


def resolve(faults: Any, setting: Setting) -> list[Fault]:
    """Returns the faults in `faults` of a recipe, a text or a list of texts. Raises RecipeError if one is invalid, or its rank or
    step does not exist in the run."""
    plan = [parse(text) for text in expand(faults, setting)]
    for fault in plan:
        if not 0 <= fault.rank < setting.ranks:
            raise RecipeError(f"faults: {fault} strikes rank {fault.rank}; give rank=0 to rank={setting.ranks - 1}")
        if fault.step > setting.steps:
            raise RecipeError(f"faults: {fault} strikes after train.steps={setting.steps}; give a smaller step")
    return plan


def expand(faults: Any, setting: Setting) -> list[str]:
    """Returns a text per fault, with every random:COUNT replaced by the faults drawn for it. Raises RecipeError if `faults` is not
    a text or list of texts, or a draw is invalid."""
    texts = [faults] if isinstance(faults, str) else faults
    if not isinstance(texts, list | tuple) or not all(isinstance(text, str) for text in texts):
        raise RecipeError(f"faults={faults!r} is not a list of faults; give e.g. {EXAMPLE}, or faults=random:20")
    drawn = [[str(fault) for fault in _random(text, setting)] if text.startswith("random") else [text] for text in texts]
    return [text for group in drawn for text in group]


def parse(text: str) -> Fault:
    """Returns the fault that `text` describes, e.g. "kill@step=5:rank=2". Raises RecipeError if the text is invalid."""
    kind, _, rest = text.partition("@")
    if kind not in KINDS:
        raise RecipeError(f"faults: {text!r} has an unknown kind; give one of {', '.join(KINDS)}, e.g. {EXAMPLE}")
    known = get_type_hints(KINDS[kind])
    options = {field.name: field for field in fields(KINDS[kind])}
    values: dict[str, Any] = {}
    for pair in rest.split(":") if rest else []:
        name, _, value = pair.partition("=")
        if name not in options:
            raise RecipeError(f"faults: {text!r}: {kind} has no {name!r}, only {', '.join(options)}; give e.g. {EXAMPLE}")
        values[name] = _value(text, name, value, known[name], options[name].metadata.get("choices"))
    if "step" not in values:
        raise RecipeError(f"faults: {text!r} has no step; give e.g. {kind}@step=5")
    return _checked(text, KINDS[kind](**values))


def _value(text: str, name: str, value: str, kind: type[Any], choices: tuple[str, ...] | None) -> Any:
    if choices and value not in choices:
        allowed = " or ".join(f"{name}={choice}" for choice in choices)
        raise RecipeError(f"faults: {text!r}: {name}={value} is unknown; give {allowed}")
    try:
        return kind(value)
    except ValueError as error:
        raise RecipeError(f"faults: {text!r}: {name} takes {_TYPE_NAMES[kind]}, not {value!r}; give e.g. {name}=5") from error


def _checked(text: str, fault: Fault) -> Fault:
    points = fault.points or tuple(Phase)
    if fault.at not in points:
        raise RecipeError(f"faults: {text!r} strikes at an unknown point; give at= one of {', '.join(points)}")
    for field in fields(fault):
        value = getattr(fault, field.name)
        least = {"step": 0 if Phase[fault.at.upper()].activity == "start" else 1, "rank": 0}.get(
            field.name, 1 if isinstance(value, int) else 0
        )
        if not isinstance(value, str) and (math.isnan(value) or value < least):
            raise RecipeError(f"faults: {text!r}: {field.name} must be at least {least}")
    return fault


def _random(text: str, setting: Setting) -> list[Fault]:
    parts = text.split(":")
    kinds = tuple(parts[2].split("+")) if len(parts) > 2 else tuple(kind for kind in DRAWN if setting.retries or kind != "nan")
    unknown = [kind for kind in kinds if kind not in KINDS]
    if parts[0] != "random" or not 2 <= len(parts) <= 3 or not parts[1].isdecimal() or unknown:
        raise RecipeError(f"faults={text}: give e.g. faults=random:20, or faults=random:20:kill+slow with kinds out of "
                          f"{', '.join(KINDS)}")  # fmt: skip
    return draw(int(parts[1]), setting, kinds)


def draw(count: int, setting: Setting, kinds: tuple[str, ...] = DRAWN) -> list[Fault]:
    """Returns `count` random faults of `kinds`, sorted by step. The result depends only on the arguments.

    No two faults are in the same step. Faults that damage or prevent checkpoints are so rare that an intact checkpoint always
    remains, unless `kinds` has no other faults. Raises RecipeError if there are not enough steps.
    """
    generator = random.Random(f"{setting.seed}/{count}/{setting.steps}/{setting.ranks}/{setting.checkpoint_every}/{kinds}")
    if count >= setting.steps:
        raise RecipeError(f"faults=random:{count} needs more steps than faults; give train.steps={count + 1} or more")
    every = setting.checkpoint_every
    steps = sorted(generator.sample(range(2, setting.steps + 1), count))
    plan: list[Fault] = []
    spared_until = 3 * every  # by then two checkpoints are committed, even if they are written in the background
    for step in steps:
        save = -(-step // max(1, every)) * every  # the next save; if it fails, its step must have no fault of its own
        spared = step <= spared_until or (save != step and save in steps)
        allowed = tuple(kind for kind in kinds if not (spared and kind in _AGAINST_CHECKPOINTS))
        kind = generator.choice(allowed or kinds)
        if kind in _AGAINST_CHECKPOINTS:
            spared_until = step + 3 * every
        rank = generator.randrange(setting.ranks)
        point = generator.choice(_IN_EVERY_STEP) if KINDS[kind].ends_process else KINDS[kind].at
        more = {"seconds": _STOPPED_SECONDS} if kind == "stop" else {}
        plan.append(KINDS[kind](step=step, rank=rank, at=point, **more))
    return plan

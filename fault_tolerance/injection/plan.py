"""From `faults` of a recipe to the faults themselves. Free of torch.

faults=[kill@step=5:rank=2:at=backward, corrupt@step=9]     these
faults=random:20                                            20, drawn with run.seed
faults=random:20:kill+slow                                  of these kinds only
"""

import math
import random
from dataclasses import dataclass, fields
from typing import Any, get_type_hints

from bagualu.comm.errors import RecipeError
from bagualu.fault_tolerance.injection.fault import Fault
from bagualu.fault_tolerance.injection.kinds import KINDS
from bagualu.fault_tolerance.points import POINTS

EXAMPLE = "faults=[kill@step=5:rank=2:at=backward]"
DRAWN = ("kill", "exception", "stop", "slow", "corrupt", "full_disk", "nan", "drop_link")
"""Kinds that any recipe survives to the bit, and quickly. Not flip: what becomes of it depends on when the guard looks next."""
_STOPPED_SECONDS = 0.5
"""So long a drawn stop lasts: nobody takes it for a hang."""
_AGAINST_CHECKPOINTS = ("corrupt", "full_disk")
_IN_EVERY_STEP = ("data", "forward", "backward", "reduce", "agree", "optimizer")
_WORDS = {int: "an integer", float: "a number", str: "a word"}


@dataclass(frozen=True)
class Setting:
    """What a plan is made for."""

    seed: int
    steps: int
    ranks: int
    checkpoint_every: int
    retries: bool = True
    """A step that is not finite is computed again; otherwise its samples would be lost, or the run."""


def resolve(faults: Any, setting: Setting) -> list[Fault]:
    """The plan that `faults` of a recipe (one text or a list of them) asks for. Raises RecipeError with the fix."""
    plan = [parse(text) for text in expand(faults, setting)]
    for fault in plan:
        if not 0 <= fault.rank < setting.ranks:
            raise RecipeError(f"faults: {fault} strikes rank {fault.rank}; give rank=0 to rank={setting.ranks - 1}")
        if fault.step > setting.steps:
            raise RecipeError(f"faults: {fault} strikes after train.steps={setting.steps}; give a smaller step")
    return plan


def expand(faults: Any, setting: Setting) -> list[str]:
    """The same with every random:COUNT drawn, one text for each fault. Raises RecipeError."""
    texts = [faults] if isinstance(faults, str) else faults
    if not isinstance(texts, list | tuple) or not all(isinstance(text, str) for text in texts):
        raise RecipeError(f"faults={faults!r} is not a list of faults; give e.g. {EXAMPLE}, or faults=random:20")
    drawn = [[str(one) for one in _random(text, setting)] if text.startswith("random") else [text] for text in texts]
    return [text for some in drawn for text in some]


def parse(text: str) -> Fault:
    """One fault. Raises RecipeError with the fix."""
    kind, _, rest = text.partition("@")
    if kind not in KINDS:
        raise RecipeError(f"faults: {text!r} is of no known kind; give one of {', '.join(KINDS)}, e.g. {EXAMPLE}")
    known = get_type_hints(KINDS[kind])
    options = {field.name: field for field in fields(KINDS[kind])}
    values: dict[str, Any] = {}
    for pair in rest.split(":") if rest else []:
        name, _, value = pair.partition("=")
        if name not in options:
            raise RecipeError(f"faults: {text!r}: {kind} has no {name!r}, but {', '.join(options)}; give e.g. {EXAMPLE}")
        values[name] = _value(text, name, value, known[name], options[name].metadata.get("choices"))
    if "step" not in values:
        raise RecipeError(f"faults: {text!r} does not say when; give e.g. {kind}@step=5")
    return _checked(text, KINDS[kind](**values))


def _value(text: str, name: str, value: str, kind: type[Any], choices: tuple[str, ...] | None) -> Any:
    if choices and value not in choices:
        raise RecipeError(f"faults: {text!r}: {name}={value} is unknown; give {' or '.join(f'{name}={one}' for one in choices)}")
    try:
        return kind(value)
    except ValueError as error:
        raise RecipeError(f"faults: {text!r}: {name} takes {_WORDS[kind]}, not {value!r}; give e.g. {name}=5") from error


def _checked(text: str, fault: Fault) -> Fault:
    points = fault.points or tuple(POINTS)
    if fault.at not in points:
        raise RecipeError(f"faults: {text!r} strikes at an unknown point; give at= one of {', '.join(points)}")
    for field in fields(fault):
        value = getattr(fault, field.name)
        least = {"step": 0 if POINTS[fault.at] == "start" else 1, "rank": 0}.get(field.name, 1 if isinstance(value, int) else 0)
        if not isinstance(value, str) and (math.isnan(value) or value < least):
            raise RecipeError(f"faults: {text!r}: {field.name} must be at least {least}")
    return fault


def _random(text: str, setting: Setting) -> list[Fault]:
    found = text.split(":")
    kinds = tuple(found[2].split("+")) if len(found) > 2 else tuple(one for one in DRAWN if setting.retries or one != "nan")
    unknown = [kind for kind in kinds if kind not in KINDS]
    if found[0] != "random" or not 2 <= len(found) <= 3 or not found[1].isdecimal() or unknown:
        raise RecipeError(f"faults={text}: give e.g. faults=random:20, or faults=random:20:kill+slow with kinds out of "
                          f"{', '.join(KINDS)}")  # fmt: skip
    return draw(int(found[1]), setting, kinds)


def draw(count: int, setting: Setting, kinds: tuple[str, ...] = DRAWN) -> list[Fault]:
    """`count` faults in the order in which they strike: a function of its arguments and of nothing else.

    No two in one step, and checkpoints are damaged or not written so seldom that a whole one remains.
    Raises RecipeError when there are not enough steps.
    """
    generator = random.Random(f"{setting.seed}/{count}/{setting.steps}/{setting.ranks}/{setting.checkpoint_every}/{kinds}")
    if count >= setting.steps:
        raise RecipeError(f"faults=random:{count} needs more steps than faults; give train.steps={count + 1} or more")
    every = setting.checkpoint_every
    steps = sorted(generator.sample(range(2, setting.steps + 1), count))
    plan: list[Fault] = []
    spared_until = 3 * every  # by then two are committed, even if they are written in the background
    for step in steps:
        save = -(-step // max(1, every)) * every  # the next one; if it fails, nothing else shall fail in that step
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

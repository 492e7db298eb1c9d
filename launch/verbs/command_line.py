"""The parser of verbs and options. Imports neither torch nor, unless an option is unknown, Hydra, so that help is fast."""

import shlex
from dataclasses import dataclass, field
from difflib import get_close_matches

from bagualu.comm.errors import RecipeError
from bagualu.launch.verbs.usage import VERBS

DOCTOR_KEYS = ("launch.workers", "launch.threads", "launch.affinity", "launch.allocator", "comm.backend", "run.dir", "data.cache")
SCHEDULE_KEYS = ("name", "stages", "micro_batches", "chunks", "forward", "input", "weight", "message", "out")
SIMULATE_KEYS = ("cluster", "world", "loads", "stragglers", "out", "trace")
"""The keys of `bagualu simulate` that are no keys of a recipe, besides those of failures."""
FAILURE_KEYS = ("days", "spares")
"""The keys about failures, besides assume.NAME."""
PLAN_KEYS = ("cluster", "world", "loads", "top", "seconds")
"""The same of `bagualu plan`."""
SEVERAL = {
    "train": "add -m to run them one after the other",
    "slurm": "one job takes one value of each key; submit a job for each, or run one after the other here with `bagualu train -m`",
    "rehearse": "one rehearsal takes one value of each key; rehearse each value by itself",
    "checkpoint": "`bagualu checkpoint` looks at one run; give each by itself",
    "generate": "one model is loaded in one layout; generate with each value by itself",
    "evaluate": "one model is loaded in one layout; evaluate with each value by itself",
    "schedule": "one schedule takes one value of each key; draw each by itself",
    "simulate": "one prediction takes one value of each key; simulate each by itself",
    "plan": "a plan keeps the one value that is given; leave the key out to search its values",
    "doctor": "`bagualu doctor` takes one value of each key",
}
"""For each verb, the advice that is printed when a key was given several values."""


@dataclass
class CommandLine:
    """A parsed command line."""

    verb: str
    """The first argument, e.g. train; "" for the help page of `bagualu` itself."""
    overrides: list[str] = field(default_factory=list)
    """The arguments that are no options: overrides of a recipe, or the arguments of `checkpoint` and `schedule`."""
    help: bool = False
    print_recipe: bool = False
    """Whether --cfg job was given: print the recipe and do nothing."""
    json: bool = False
    multirun: bool = False
    """Whether -m was given: run a sweep."""
    print_script: bool = False
    """Whether --print was given: print the batch script and do nothing."""
    compare: bool = True
    """False with --no-compare: leave out the rehearsal's run without faults."""
    quick: bool = False
    """Whether --quick was given: measure few sizes."""
    ignore_eos: bool = False
    """Whether --ignore-eos was given: go on after the end of a document."""
    values: list[tuple[str, str]] = field(default_factory=list)
    """The options with a value, in the order given."""


_WITH_VALUE = (
    *("--prompt", "--prompt-file", "--tokens", "--max-new-tokens", "--temperature", "--top-p", "--min-p", "--repetition-penalty"),
    *("--seed", "--stop"),
)
"""Options that take a value: the next argument, or what follows = in the same one."""
_LONG = {"-h": "--help", "-m": "--multirun", "-c": "--cfg"}
_OPTIONS = {
    "--help": tuple(VERBS),
    "--json": tuple(VERBS),
    "--multirun": ("train",),
    "--print": ("slurm",),
    "--no-compare": ("rehearse",),
    "--quick": ("doctor",),
    "--cfg": ("train", "slurm", "rehearse"),
    "--ignore-eos": ("generate",),
    **dict.fromkeys(_WITH_VALUE, ("generate",)),
}
"""Every option, and the verbs that accept it."""
_SETS = {
    "--help": ("help", True), "--json": ("json", True), "--multirun": ("multirun", True), "--print": ("print_script", True),
    "--no-compare": ("compare", False), "--quick": ("quick", True), "--cfg": ("print_recipe", True),
    "--ignore-eos": ("ignore_eos", True),
}  # fmt: skip
"""The field of CommandLine that each option sets, and the value that the field gets."""


def read(arguments: list[str]) -> CommandLine:
    """Returns the parsed command line. Raises RecipeError for an unknown verb, or an option that the verb does not accept."""
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        return CommandLine("", help=True)
    verb = arguments[0]
    if verb not in VERBS:
        raise RecipeError(f"unknown verb {verb}; {_instead_of_verb(arguments)} (bagualu --help)")
    request, rest = CommandLine(verb), arguments[1:]
    while rest:
        argument = rest.pop(0)
        option = argument.removesuffix("=job") if argument.startswith("--cfg=") else argument
        if not option.startswith("-"):
            request.overrides.append(option)
            continue
        name = _LONG.get(option, option)
        given, equals, value = option.partition("=")
        if given in _WITH_VALUE and verb in _OPTIONS[given]:
            if not equals and not rest:
                raise RecipeError(f"{given} takes a value, e.g. {_example(given)}; see bagualu {verb} --help")
            request.values.append((given, value if equals else rest.pop(0)))
            continue
        if verb not in _OPTIONS.get(name, ()):
            raise RecipeError(unknown_option(option, verb))
        if name == "--cfg" and option == argument and rest[:1] != ["job"]:
            raise RecipeError(f"{option} takes the word job: bagualu {verb} --cfg job")
        if name == "--cfg" and option == argument:
            rest.pop(0)
        setattr(request, *_SETS[name])
    return request


def _example(option: str) -> str:
    """Returns an option with an example of its value."""
    texts = {"--prompt": "'def '", "--prompt-file": "prompts.txt", "--tokens": "5,17,101", "--stop": "'\\n\\n'"}
    return f"{option} {texts.get(option, 1)}"


def _instead_of_verb(arguments: list[str]) -> str:
    verb, known = arguments[0], f"there are {', '.join(VERBS)}"
    if near := get_close_matches(verb, VERBS, n=1):
        return f"did you mean bagualu {near[0]}?"
    if verb.startswith("-") or "=" in verb:
        return f"a verb comes first, e.g. bagualu train {shlex.join(arguments)}; {known}"
    return known


def unknown_option(option: str, verb: str) -> str:
    """Returns the error message for an option that `bagualu VERB` does not accept: what is wrong and what to type."""
    given, equals, value = option.partition("=")
    name, unknown, see = _LONG.get(given, given), f"unknown option {option}", f"see bagualu {verb} --help"
    if verb in _OPTIONS.get(name, ()):
        return f"{option}: give --cfg job" if name == "--cfg" else f"{given} takes no value; give {given}"
    if name == "--multirun":
        return f"{unknown}: {SEVERAL[verb]}"
    if name in _OPTIONS:
        return f"{unknown}: it is an option of {', '.join(f'bagualu {other}' for other in _OPTIONS[name])}; {see}"
    if key := _meant_key(given.lstrip("-"), verb):
        return f"{unknown}: keys have no dashes, give {key}={value if equals else 'VALUE'}; {see}"
    own = [known for known in _OPTIONS if verb in _OPTIONS[known]]
    near = get_close_matches(given, own, n=1, cutoff=0.75)
    return f"{unknown}; did you mean {near[0]}?" if near else f"{unknown}; {see}"


def _meant_key(name: str, verb: str) -> str | None:
    """Returns the key that was probably meant by the option --NAME; None if no key is like it."""
    if name in {"simulate": (*SIMULATE_KEYS, *FAILURE_KEYS), "plan": (*PLAN_KEYS, *FAILURE_KEYS)}.get(verb, ()):
        return name
    if own := {"schedule": SCHEDULE_KEYS, "doctor": DOCTOR_KEYS}.get(verb):
        return next((key for key in own if name in (key, key.rsplit(".", 1)[-1])), None)
    if verb in ("checkpoint", "evaluate", "generate"):
        return None
    from bagualu.trainer.recipe.keys import keys  # Hydra's library

    known = list(keys())
    return name if name in known else next((key for key in known if key.rsplit(".", 1)[-1] == name.replace("-", "_")), None)

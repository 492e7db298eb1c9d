"""`bagualu plan recipe=NAME cluster=NAME world=N`: finds the layouts with which a recipe trains fastest on a described cluster.

Torch, which the traces need, is imported only once the recipe and the cluster are known to be right.
"""

import time
from dataclasses import asdict, dataclass, replace
from typing import Any

from bagualu.comm.errors import RecipeError
from bagualu.comm.topology import Cluster
from bagualu.launch.verbs.command_line import PLAN_KEYS, SEVERAL, CommandLine
from bagualu.launch.verbs.failure_words import split_failure_words
from bagualu.launch.verbs.own_words import split_words
from bagualu.launch.verbs.plan_command import command, key_of, layout_keys, length_keys, machine_keys
from bagualu.launch.verbs.question import check_loads, read_cluster_of, require_devices, whole
from bagualu.parallel.planner.search import Effort, RankedLayout
from bagualu.trainer.process.failure import DONE
from bagualu.trainer.recipe.compose import compose
from bagualu.trainer.recipe.config import CHOSEN, Recipe
from bagualu.trainer.simulation.failures import FailureQuestion, RunLength, require_forecast, run_length
from bagualu.trainer.simulation.search_space import plannable, search_space

_DEFAULTS = {"top": "10", "seconds": "50"}
_LEAST_SECONDS = 5


@dataclass(frozen=True)
class PlanQuestion:
    """What is to be planned."""

    recipe: Recipe
    words: list[str]
    """The overrides of which the recipe was composed."""
    cluster: Cluster
    world: int
    top: int
    """How many layouts are wanted."""
    effort: Effort
    loads: str | None
    """How tokens spread over experts, as `loads.read_shares` takes it."""
    failures: FailureQuestion
    """What is asked of failures: if anything is, the command gets as many steps as fit."""

    @property
    def given(self) -> list[str]:
        """The keys that keep their values."""
        return [key_of(word) for word in self.words]


def plan(request: CommandLine) -> tuple[int, Any]:
    """Print the best layouts, the command that runs the best of them, and what other choices cost. Returns the exit code and the
    object that --json prints. Raises RecipeError."""
    started = time.perf_counter()
    question = read_plan(request)
    recipe, world = question.recipe, question.world
    from bagualu.launch.verbs.plan_text import as_choice, as_plan, choice_lines, length_text, notes, other_choices, table
    from bagualu.trainer.simulation.loads import read_shares
    from bagualu.trainer.simulation.planning import find_layouts

    shares = read_shares(question.loads, recipe.model) if question.loads else None
    found = find_layouts(
        recipe, question.cluster, world, question.given, question.effort, lambda: time.perf_counter() - started, shares
    )
    machines = machine_keys(recipe, question.given, question.cluster.for_world(world), world)
    nodes = machines.get("launch.nodes", recipe.launch.nodes)
    step_tokens = recipe.data.global_batch * recipe.data.sequence_length
    asked = replace(question.failures, own_interval="checkpoint.every" in question.given)
    length = _length(found.ranked[0], asked) if asked.asked else None
    plans: list[dict[str, Any]] = []
    for one in found.ranked[: question.top]:
        layout = layout_keys(recipe, one.layout.values())
        own = {key: value for key, value in layout.items() if key not in question.given}
        if length is not None and not plans:
            own |= {key: value for key, value in length_keys(recipe, length).items() if key not in question.given}
        plans.append(as_plan(one, layout, command(question.words, own | machines, nodes), found.ranked[0]))
    if not request.json:
        chips = " and ".join(part.chip.name for part in question.cluster.parts)
        print(f"{recipe.run.name} on {world} x {chips}: {found.estimated} layouts estimated, the best {len(found.ranked)} of them "
              f"predicted, in {time.perf_counter() - started:.0f} s")  # fmt: skip
        print("\n".join(["", *table(found, question.top), ""]))
        if length is not None:
            print(length_text(length, step_tokens))
        print(f"the best layout:\n  {plans[0]['command']}")
        print("\n".join(["", "other choices, each in the best layout found that has it:", *choice_lines(found)]))
        print("\n".join(["", *notes(found, question.top)]))
    others = [as_choice(keys, one, layout_keys(recipe, one.layout.values()), found.ranked[0]) for keys, one in other_choices(found)]
    run = None if length is None else asdict(length) | {"tokens": length.steps * step_tokens}
    return DONE, {"plans": plans, "others": others, "estimated": found.estimated, "complete": found.complete, "run": run}


def _length(best: RankedLayout[Any], question: FailureQuestion) -> RunLength:
    """Returns how long a run in the best layout is that ends in time."""
    predicted = best.exact
    assert predicted is not None
    recipe = predicted.recipe
    return run_length(recipe, predicted.cluster, predicted.layout, predicted.step_seconds, question)


def read_plan(request: CommandLine) -> PlanQuestion:
    """Returns what the words of the command line ask. Raises RecipeError, also if no layout divides."""
    failures, others = split_failure_words(request.overrides)
    own, words = split_words(others, PLAN_KEYS.__contains__)
    require_devices("plan", own)
    world, top, seconds = (whole(key, (_DEFAULTS | own)[key]) for key in ("world", "top", "seconds"))
    if seconds < _LEAST_SECONDS:
        raise RecipeError(f"seconds={seconds} is less than a search takes; give seconds={_LEAST_SECONDS} or more")
    recipe = compose(words, SEVERAL["plan"])
    recipe.train.validate()
    if recipe.train.micro_batch == CHOSEN:  # the plan chooses it, and the command has its choice
        words = [word for word in words if key_of(word) != "train.micro_batch"]
    if loads := own.get("loads"):
        check_loads(loads, recipe.model.moe.experts)
    cluster = read_cluster_of(own, recipe)
    effort = Effort(estimate_seconds=0.4 * seconds, total_seconds=0.95 * seconds, most_exact=max(top, Effort.most_exact))
    question = PlanQuestion(recipe, words, cluster, world, top, effort, loads, failures)
    sized = cluster.for_world(world)
    if failures.asked:
        require_forecast(recipe, sized, failures)
    search_space(plannable(recipe, sized, question.given), sized, world, question.given)
    return question

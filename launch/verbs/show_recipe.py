"""`--cfg job`: prints the recipe with every key."""

from typing import Any

from bagualu.launch.verbs.command_line import SEVERAL, CommandLine
from bagualu.launch.verbs.sweep import jobs
from bagualu.trainer.process.failure import DONE
from bagualu.trainer.recipe.compose import as_dict, compose, resolved_yaml


def show_recipe(request: CommandLine) -> tuple[int, Any]:
    """Print the recipe, or all recipes of a sweep. Returns the exit code and the object that --json prints."""
    several = SEVERAL[request.verb]
    recipes = [job.recipe for job in jobs(request.overrides)] if request.multirun else [compose(request.overrides, several)]
    if not request.json:
        print("---\n".join(map(resolved_yaml, recipes)), end="")
    documents = [as_dict(recipe) for recipe in recipes]
    return DONE, documents if request.multirun else documents[0]

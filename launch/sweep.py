"""`-m`: one recipe for every combination of the values given, each with a run directory of its own. Free of torch."""

import re
from collections.abc import Sequence

from hydra._internal.core_plugins.basic_sweeper import BasicSweeper

from bagualu.comm.errors import RecipeError
from bagualu.trainer.config import Recipe
from bagualu.trainer.recipe import compose, parse


def jobs(overrides: Sequence[str]) -> list[tuple[list[str], Recipe]]:
    """Overrides and recipe of every job, in Hydra's order. Raises RecipeError before the first one runs."""
    parsed = parse(overrides)
    swept = [override.key_or_group for override in parsed if override.is_sweep_override()]
    if not swept:
        raise RecipeError("-m was given but no key has several values; give e.g. optim.lr=1e-3,3e-4")
    (batch,) = BasicSweeper.split_arguments(parsed, max_batch_size=None)
    found: dict[str, tuple[list[str], Recipe]] = {}
    for job in batch:
        recipe = compose(job)
        values = [text for text in job if text.lstrip("+").split("=", 1)[0] in swept]
        if "run.dir" not in swept:
            recipe.run.dir += "-" + ",".join(re.sub(r"[^A-Za-z0-9._=-]+", "_", value) for value in values)
        if recipe.run.dir in found:
            raise RecipeError(f"two jobs of the sweep, {' '.join(values)} and another, share {recipe.run.dir}; "
                              f"leave run.dir out of the sweep")  # fmt: skip
        found[recipe.run.dir] = ([*(text for text in job if not text.startswith("run.dir=")),
                                  f"run.dir={_quoted(recipe.run.dir)}"], recipe)  # fmt: skip
    return list(found.values())


def _quoted(text: str) -> str:
    """A value as Hydra's grammar takes it."""
    return text if re.fullmatch(r"[A-Za-z0-9._/-]+", text) else f'"{text}"'

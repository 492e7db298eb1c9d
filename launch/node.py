"""One node's part of a run on several: `python -m bagualu.launch.node --meet HEAD:PORT --id NAME recipe=... launch.nodes=N`.

Started alike on every node, by hand or by the script of `bagualu slurm`. The agent that runs on HEAD holds the store where all
meet. A node whose agent died is started again with the same words, and joins where the run is. Free of torch until workers start.
"""

import argparse
import sys

from bagualu.comm.errors import RecipeError
from bagualu.launch import storage
from bagualu.launch.meeting import Meeting
from bagualu.launch.run import run
from bagualu.trainer import preflight
from bagualu.trainer.config import Recipe
from bagualu.trainer.outcome import REFUSED
from bagualu.trainer.recipe import compose, save_recipe
from bagualu.trainer.stopping import StopRequest


def main(arguments: list[str] | None = None, entrypoint: str | None = None) -> int:
    """Run this node's workers to the end of the training; the exit code, the same on every node."""
    parser = argparse.ArgumentParser(prog="python -m bagualu.launch.node", description="One node's part of a run on several.")
    parser.add_argument("--meet", required=True, metavar="HOST:PORT", help="where the nodes meet: one of them, and a free port")
    parser.add_argument("--id", required=True, metavar="NAME", help="tells this run from others that meet there")
    parser.add_argument("--job", metavar="NAME", help="the batch job, the same when it is put back into the queue; else as --id")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="the recipe, as for bagualu train; the same everywhere")
    given = parser.parse_args(arguments)
    try:
        recipe = compose(given.overrides)
        job = given.job or given.id
        recipe, backend = storage.choose_backend(recipe, preflight.workers_per_node(recipe))
        workers = _check(recipe, job)
        meeting = _meeting(recipe, given.meet, given.id, job, workers)
    except RecipeError as error:
        print(f"bagualu: error: {error}", file=sys.stderr)
        return REFUSED
    save_recipe(recipe)
    layout, nodes = recipe.validate(recipe.world_size()), recipe.launch.nodes
    print(f"{recipe.run.name}: {layout} as {workers} processes on each of {nodes} nodes with {backend}, in {recipe.run.dir}",
          file=sys.stderr, flush=True)  # fmt: skip
    code, _ = run(recipe, workers, given.overrides, entrypoint, False, StopRequest(), meeting)
    return code


def _check(recipe: Recipe, job: str) -> int:
    """The workers of this node. Raises RecipeError."""
    if recipe.comm.backend == "simulated":
        raise RecipeError("comm.backend=simulated runs in one process; use bagualu train, or comm.backend=nccl or gloo here")
    if not recipe.checkpoint.resume:
        raise RecipeError("a node joins a run wherever that is; give checkpoint.resume=true, which begins at the beginning "
                          "where there is no checkpoint")  # fmt: skip
    workers = preflight.workers_per_node(recipe)
    preflight.check(recipe, recipe.world_size())
    storage.check(recipe, job)
    return workers


def _meeting(recipe: Recipe, place: str, id: str, job: str, workers: int) -> Meeting:
    host, colon, port = place.rpartition(":")
    if not (host and colon and port.isdigit()):
        raise RecipeError(f"--meet {place}: give a host and a port, e.g. --meet node1:29400")
    nodes, fewest = recipe.launch.nodes, recipe.launch.nodes
    if recipe.restart.elastic:
        fewest = -(-recipe.restart.min_workers // workers)
    return Meeting(host, int(port), id, job, nodes, fewest)


if __name__ == "__main__":
    sys.exit(main())

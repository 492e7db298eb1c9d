"""One node's part of a run on several: `python -m bagualu.launch.node --meet HEAD:PORT --id NAME recipe=... launch.nodes=N`.

Started alike on every node, by hand or by the script of `bagualu slurm`. The agent that runs on HEAD holds the store where all
meet. A node whose agent died is started again with the same words, and joins where the run is. Free of torch until workers start.
"""

import argparse
import contextlib
import sys
from pathlib import Path

from bagualu.comm.errors import RecipeError
from bagualu.comm.interface import addresses_towards
from bagualu.launch.workers import secret, storage_probe
from bagualu.launch.workers.rendezvous_config import Meeting
from bagualu.launch.workers.run import run, tell_refusal
from bagualu.trainer.output import streams
from bagualu.trainer.process.failure import REFUSED
from bagualu.trainer.process.stop_request import StopRequest
from bagualu.trainer.recipe import preflight
from bagualu.trainer.recipe.compose import compose, save_recipe
from bagualu.trainer.recipe.config import Recipe


def main(arguments: list[str] | None = None, entrypoint: str | None = None) -> int:
    """Run this node's workers to the end of the training; the exit code, the same on every node."""
    streams.secure()
    parser = argparse.ArgumentParser(prog="python -m bagualu.launch.node", description="One node's part of a run on several.")
    parser.add_argument("--meet", required=True, metavar="HOST:PORT", help="where the nodes meet: one of them, and a free port")
    parser.add_argument("--id", required=True, metavar="NAME", help="tells this run from others that meet there")
    parser.add_argument("--job", metavar="NAME", help="the batch job, the same when it is put back into the queue; else as --id")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="the recipe, as for bagualu train; the same everywhere")
    given = parser.parse_args(arguments)
    stop = StopRequest()
    try:
        recipe = compose(given.overrides)
        job = given.job or given.id
        workers = preflight.workers_per_node(recipe)
        _check(recipe)
        address = _address(given.meet)
    except RecipeError as error:
        return _refused(error)
    try:
        recipe, backend = storage_probe.choose_backend(recipe, workers)
        preflight.check(recipe, recipe.world_size())
        preflight.check_login(recipe)
        storage_probe.check(recipe, job)
        meeting = _meeting(recipe, address, given.id, job, workers)
        save_recipe(recipe)
    except RecipeError as error:  # of this node alone, perhaps: others may wait for it
        code = _refused(error)
        if recipe.launch.nodes > 1:
            with contextlib.suppress(RecipeError):
                tell_refusal(recipe, workers, error, stop, _meeting(recipe, address, given.id, job, workers))
        return code
    layout, nodes = recipe.validate(recipe.world_size()), recipe.launch.nodes
    print(f"{recipe.run.name}: {layout} as {workers} processes on each of {nodes} nodes with {backend}, in {recipe.run.dir}",
          file=sys.stderr, flush=True)  # fmt: skip
    code, _ = run(recipe, workers, given.overrides, entrypoint, False, stop, meeting)
    return code


def _check(recipe: Recipe) -> None:
    """What is wrong with the recipe itself, and so on every node. Raises RecipeError."""
    recipe.validate(recipe.world_size())
    if recipe.comm.backend == "simulated":
        raise RecipeError("comm.backend=simulated runs in one process; use bagualu train, or comm.backend=nccl or gloo here")
    if not recipe.checkpoint.resume:
        raise RecipeError("a node joins a run wherever that is; give checkpoint.resume=true, which begins at the beginning "
                          "where there is no checkpoint")  # fmt: skip


def _refused(error: RecipeError) -> int:
    print(f"bagualu: error: {error}", file=sys.stderr, flush=True)
    return REFUSED


def _address(text: str) -> tuple[str, int]:
    """The host and the port of --meet. Raises RecipeError."""
    host, colon, port = text.rpartition(":")
    if not (host and colon and port.isdigit() and 0 < int(port) < 2**16):
        raise RecipeError(f"--meet {text}: give a host and a port, e.g. --meet node1:29400")
    try:
        addresses_towards(host, int(port))
    except OSError as error:
        raise RecipeError(f"--meet {text}: there is no way to {host} from here ({error.strerror}); give the address of a node "
                          "that all nodes can reach") from error  # fmt: skip
    return host, int(port)


def _meeting(recipe: Recipe, address: tuple[str, int], id: str, job: str, workers: int) -> Meeting:
    """Raises RecipeError when there is no secret to sign with."""
    nodes, fewest = recipe.launch.nodes, recipe.launch.nodes
    if recipe.restart.elastic:
        fewest = -(-recipe.restart.min_workers // workers)
    return Meeting(*address, id, job, nodes, fewest, secret.of_the_job(Path(recipe.run.dir)))


if __name__ == "__main__":
    sys.exit(main())

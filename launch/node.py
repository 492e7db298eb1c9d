"""Runs one node's workers in a run on several nodes.

    python -m bagualu.launch.node --meet HEAD:PORT --id NAME recipe=... launch.nodes=N

The same command is started on every node, by hand or by the script of `bagualu slurm`. The agent on HEAD hosts the store through
which the agents find each other. If a node's agent dies, start it again with the same command, and it joins the running training.
"""

import argparse
import contextlib
import functools
import sys
from pathlib import Path

from bagualu.comm.errors import RecipeError
from bagualu.comm.interface import addresses_towards
from bagualu.launch.workers import secret, storage_probe
from bagualu.launch.workers.rendezvous_config import Meeting
from bagualu.launch.workers.run import run, tell_refusal
from bagualu.trainer.costs.fits import check_memory, device_of
from bagualu.trainer.output import streams
from bagualu.trainer.process.failure import REFUSED
from bagualu.trainer.process.stop_request import StopRequest
from bagualu.trainer.recipe import preflight
from bagualu.trainer.recipe.compose import compose
from bagualu.trainer.recipe.config import Recipe


def main(arguments: list[str] | None = None, entrypoint: str | None = None) -> int:
    """Run this node's workers until training ends. Returns the exit code of the run, which is the same on all nodes that stay in it
    until it ends. A node that is refused, or asked to stop before its workers start, has a code of its own."""
    streams.secure()
    parser = argparse.ArgumentParser(prog="python -m bagualu.launch.node", description="Run one node of a run on several nodes.")
    parser.add_argument("--meet", required=True, metavar="HOST:PORT", help="one of the nodes, and a free port on it")
    parser.add_argument("--id", required=True, metavar="NAME", help="name that other runs with the same HOST:PORT do not use")
    parser.add_argument("--job", metavar="NAME", help="id of the batch job, the same after a requeue; default: --id")
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
    key = functools.cache(lambda: secret.of_the_job(Path(recipe.run.dir)))  # it takes the secret out of the environment
    try:
        recipe, chosen = storage_probe.settle(recipe, workers)
        preflight.check(recipe, recipe.world_size())
        check_memory(recipe, recipe.world_size(), device_of(recipe, workers))
        preflight.check_login(recipe)
        storage_probe.check(recipe, job)
        meeting = _meeting(recipe, address, given.id, job, workers, key())
    except RecipeError as error:  # perhaps on this node only, and the others may be waiting for it
        code = _refused(error)
        if recipe.launch.nodes > 1:
            with contextlib.suppress(RecipeError):
                tell_refusal(recipe, workers, error, stop, _meeting(recipe, address, given.id, job, workers, key()))
        return code
    layout, nodes = recipe.validate(recipe.world_size()), recipe.launch.nodes
    print(f"{recipe.run.name}: {layout} ({recipe.parallel.engine_text}) as {workers} processes on each of {nodes} nodes "
          f"with {chosen}, in {recipe.run.dir}", file=sys.stderr, flush=True)  # fmt: skip
    code, _ = run(recipe, workers, entrypoint, False, stop, meeting)
    return code


def _check(recipe: Recipe) -> None:
    """Raises RecipeError for mistakes in the recipe itself, which every node refuses."""
    recipe.validate(recipe.world_size())
    if recipe.comm.backend == "simulated":
        raise RecipeError("comm.backend=simulated runs in one process; use bagualu train, or comm.backend=nccl or gloo here")
    if not recipe.checkpoint.resume:
        raise RecipeError("a node must be able to join a run that has saved checkpoints; give checkpoint.resume=true, which "
                          "starts from step 0 if there is no checkpoint")  # fmt: skip


def _refused(error: RecipeError) -> int:
    print(f"bagualu: error: {error}", file=sys.stderr, flush=True)
    return REFUSED


def _address(text: str) -> tuple[str, int]:
    """Returns the host and the port in `text`, the value of --meet. Raises RecipeError if it has another form or the host cannot be
    reached."""
    host, colon, port = text.rpartition(":")
    if not (host and colon and port.isdigit() and 0 < int(port) < 2**16):
        raise RecipeError(f"--meet {text}: give a host and a port, e.g. --meet node1:29400")
    try:
        addresses_towards(host, int(port))
    except OSError as error:
        raise RecipeError(f"--meet {text}: {host} cannot be reached from here ({error.strerror}); give the address of a node "
                          "that all nodes can reach") from error  # fmt: skip
    return host, int(port)


def _meeting(recipe: Recipe, address: tuple[str, int], id: str, job: str, workers: int, key: str) -> Meeting:
    """Returns the description of this run's rendezvous; `key` is the job's secret."""
    nodes, fewest = recipe.launch.nodes, recipe.launch.nodes
    if recipe.restart.elastic:
        fewest = -(-recipe.restart.min_workers // workers)
    return Meeting(*address, id, job, nodes, fewest, key)


if __name__ == "__main__":
    sys.exit(main())

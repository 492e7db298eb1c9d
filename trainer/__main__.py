"""Runs a worker that torchrun started, or alone as the only rank. Processes that srun or mpirun started directly are refused.

    torchrun --nproc-per-node 4 -m bagualu.trainer recipe=moe_tiny

The recipe is composed and checked before torch is imported; what generated kernels save is predicted afterwards. An error in it is
the same on every rank, so only rank 0 prints it. Only rank 0 checks the run directory too, because it writes there while others
may still be starting.
"""

import os
import sys
import time
import traceback
from contextlib import nullcontext
from pathlib import Path

from bagualu.comm.errors import RecipeError
from bagualu.comm.world import Tasks, World
from bagualu.fault_tolerance import run_lock
from bagualu.fault_tolerance.run_directory import RunDirectory
from bagualu.trainer.costs.fits import check_memory, device_of
from bagualu.trainer.output import streams
from bagualu.trainer.output.log_file import copy_to_log
from bagualu.trainer.output.progress import summary_text
from bagualu.trainer.output.start import Start
from bagualu.trainer.process import environment
from bagualu.trainer.process.failure import DONE, FAILED, REFUSED, STOPPED, Failure, last_line, what_next
from bagualu.trainer.process.garbage_collection import uncollected
from bagualu.trainer.process.parent_death import die_with
from bagualu.trainer.process.stop_request import StopRequest
from bagualu.trainer.recipe import preflight
from bagualu.trainer.recipe.compose import compose
from bagualu.trainer.recipe.config import Recipe
from bagualu.trainer.settle import settle

_PREPARED = "BAGUALU_PREPARED"
"""The environment variable that is set in a process that has restarted itself with the variables of `_prepare`."""
_TORCHRUN = "TORCHELASTIC_RUN_ID"
"""The environment variable that torchrun sets in its workers. Such a worker asks the kernel to kill it when torchrun ends,
since it would otherwise outlive a torchrun that is killed."""


def main(overrides: list[str], entrypoint: str | None = None) -> int:
    """Trains as the rank given by the environment; returns the exit code. If training fails, it ends the process instead.

    `entrypoint`: the function to run instead of the trainer, as "module:function".
    """
    streams.secure()
    if _TORCHRUN in os.environ:  # a process started by hand may outlive its shell
        die_with(os.getppid())
    if tasks := Tasks.from_environment():
        if tasks.index == 0:
            print(f"bagualu: error: {tasks.refusal()}", file=sys.stderr)
        return REFUSED
    try:
        world = World.from_environment()
    except RecipeError as error:
        print(f"bagualu: error: {error}", file=sys.stderr)
        return REFUSED
    local_workers = int(os.environ.get("LOCAL_WORLD_SIZE", world.size))
    try:
        if options := [text for text in overrides if text.startswith("-")]:
            raise RecipeError(f"unknown option {options[0]}: a worker takes key=value only; see bagualu train --help")
        given = compose(overrides)
        recipe, _ = settle(given, local_workers, world.size, predicts=False)
        preflight.check(recipe, world.size)
        if recipe.comm.backend == "simulated":
            raise RecipeError("comm.backend=simulated is for `bagualu train`; give comm.backend=gloo or nccl here")
        check_memory(recipe, world.size, device_of(recipe, local_workers))
        if world.rank == 0 and _PREPARED not in os.environ:
            run_lock.refuse_if_held(Path(recipe.run.dir))
            preflight.check_run_directory(recipe)
            preflight.check_login(recipe)
    except RecipeError as error:
        if world.rank == 0:
            print(f"bagualu: error: {error}", file=sys.stderr)
        return REFUSED
    _prepare(recipe, local_workers)
    try:
        recipe, chosen = settle(given, local_workers, world.size)
        with run_lock.hold(Path(recipe.run.dir)) if world.rank == 0 else nullcontext():
            if world.rank == 0:
                layout = f"{recipe.validate(world.size)} ({recipe.parallel.engine_text})"
                print(f"{recipe.run.name}: {layout} as {world.size} processes with {chosen}, in {recipe.run.dir}",
                      file=sys.stderr, flush=True)  # fmt: skip
            return _train(recipe, world, local_workers, entrypoint)
    except RecipeError as error:  # another job has taken the run directory meanwhile
        print(f"bagualu: error: {error}", file=sys.stderr)
        return REFUSED


def _prepare(recipe: Recipe, local_workers: int) -> None:
    """Restarts this process, at most once, if an environment variable lacks the value that workers start with (environment.py)."""
    wanted = environment.variables(recipe.launch, local_workers)
    if _PREPARED not in os.environ and any(os.environ.get(name) != value for name, value in wanted.items()):
        os.environ.update(wanted, **{_PREPARED: "1"})
        sys.stdout.flush()
        sys.stderr.flush()
        os.execv(sys.executable, sys.orig_argv)


def _train(recipe: Recipe, world: World, local_workers: int, entrypoint: str | None) -> int:
    with uncollected():
        import torch  # deferred: a wrong recipe is refused before

        from bagualu.trainer.process.worker import work

    environment.pin(recipe.launch, world.local_rank, local_workers)
    torch.set_num_threads(environment.threads(recipe.launch, local_workers))
    start = Start(recipe)
    if world.rank == 0:
        start.save_recipe()
        start.begin()
    stop = StopRequest()
    stop.tell.append(copy_to_log(RunDirectory(recipe.run.dir).log(world.rank)))
    failures: list[Failure] = []
    try:
        summary = work(recipe, world, stop, failures.append, entrypoint or environment.TRAIN)
    except BaseException:
        why = failures[0] if failures else Failure(world.rank, "train", "interrupted twice", time.time())
        _say_ended(start, world.rank, why)
        if why.kind != "recipe":
            traceback.print_exc()
        if why.kind != "recipe" or world.rank == 0:
            advice = "if it only lost a peer, see the other ranks' last lines" if world.size > 1 else what_next(why)
            print(last_line(why, advice), file=sys.stderr, flush=True)
        os._exit(REFUSED if why.kind == "recipe" else FAILED)  # skips destructors, which would wait for lost peers
    if world.rank == 0:
        print(summary_text(summary))
    return STOPPED if summary["ended"] == "stopped" else DONE


def _say_ended(start: Start, rank: int, failure: Failure) -> None:
    """Records the failure in summary.json, on rank 0 or on a rank that detects that rank 0 is gone. If the recipe was refused
    before the first step, rank 0 makes the file what it was before this start instead."""
    if rank > 0:
        start.fail_if_left(failure)
    elif failure.kind == "recipe" and not failure.step:
        start.refuse()
    else:
        start.fail(failure)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

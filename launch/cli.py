"""The command `bagualu`. It imports Hydra only to compose a recipe, and torch only to start workers or compare checkpoints, so that
help is fast."""

import sys
from typing import Any

from bagualu.comm.jsonl import dumps
from bagualu.trainer.output import streams

_INTERRUPTED = 130
"""The exit code that shells use for a command ended by Ctrl-C."""


def main(arguments: list[str] | None = None, entrypoint: str | None = None) -> int:
    """Run a command line (None: that of this process) and return its exit code. Ranks run `entrypoint`, given as "module:function";
    None: the trainer."""
    streams.secure()
    arguments = sys.argv[1:] if arguments is None else arguments
    try:
        code, document = _run_guarded(arguments, entrypoint)
    except KeyboardInterrupt:
        print("bagualu: interrupted by Ctrl-C", file=sys.stderr)
        code, document = _INTERRUPTED, {"ended": "interrupted"}
    if "--json" in arguments and document is not None:
        print(dumps(document, indent=2))
    return code


def _run_guarded(arguments: list[str], entrypoint: str | None) -> tuple[int, Any]:
    """Does and returns what `_run` does, but prints a RecipeError or OSError as one line instead of raising it, and returns its
    exit code and the object that --json prints."""
    # Everything else of Bagualu is imported inside this function, so that a Ctrl-C during these imports prints its line too.
    from bagualu.comm.errors import RecipeError
    from bagualu.trainer.process.failure import FAILED, REFUSED, os_error

    try:
        return _run(arguments, entrypoint)
    except RecipeError as error:
        print(f"bagualu: error: {error}", file=sys.stderr)
        return REFUSED, {"ended": "refused", "error": str(error)}
    except OSError as error:
        print(f"bagualu: failed: {os_error(error)}", file=sys.stderr)
        return FAILED, {"ended": "failed", "cause": os_error(error)}


def _run(arguments: list[str], entrypoint: str | None) -> tuple[int, Any]:
    """Run a command line. Returns the exit code and the object that --json prints."""
    from bagualu.launch.verbs import command_line, usage

    request = command_line.read(arguments)
    if request.help:
        from bagualu.trainer.process.failure import DONE

        print(usage.page(request.verb))
        return DONE, None
    if request.verb == "checkpoint":
        from bagualu.launch.verbs.checkpoint import checkpoint

        return checkpoint(request)
    if request.verb == "schedule":
        from bagualu.launch.verbs.schedule import schedule

        return schedule(request)
    # Imported only now, because these need Hydra or torch.
    if request.verb == "simulate":
        from bagualu.launch.verbs.simulate import simulate

        return simulate(request)
    if request.verb == "evaluate":
        from bagualu.launch.verbs.evaluate import evaluate

        return evaluate(request)
    if request.verb == "generate":
        from bagualu.launch.verbs.generate import generate

        return generate(request)
    if request.verb == "plan":
        from bagualu.launch.verbs.plan import plan

        return plan(request)
    if request.verb == "doctor":
        from bagualu.launch.verbs.doctor import doctor

        return doctor(request)
    if request.print_recipe:
        from bagualu.launch.verbs.show_recipe import show_recipe

        return show_recipe(request)
    if request.verb == "slurm":
        from bagualu.launch.verbs.slurm import slurm

        return slurm(request)
    if request.verb == "rehearse":
        from bagualu.launch.verbs.rehearse import rehearse

        return rehearse(request, entrypoint)
    from bagualu.launch.verbs.train import train

    return train(request, entrypoint)


if __name__ == "__main__":
    sys.exit(main())

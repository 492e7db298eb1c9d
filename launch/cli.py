"""The command `bagualu`. Nothing here imports torch, nor Hydra before a recipe is composed, so that help comes at once."""

import json
import sys
from typing import Any

from bagualu.comm.errors import RecipeError
from bagualu.launch import usage
from bagualu.launch.checkpoint import checkpoint
from bagualu.launch.schedule import schedule
from bagualu.trainer.outcome import DONE, FAILED, REFUSED


def main(arguments: list[str] | None = None, entrypoint: str | None = None) -> int:
    """Run a command line; the exit code. `entrypoint` is what a rank runs in place of the trainer, as "module:function"."""
    words = sys.argv[1:] if arguments is None else arguments
    try:
        code, document = _run(words, entrypoint)
    except RecipeError as error:
        print(f"bagualu: error: {error}", file=sys.stderr)
        code, document = REFUSED, {"ended": "refused", "error": str(error)}
    except OSError as error:
        what = f"{error.strerror or error}" + (f": {error.filename}" if error.filename else "")
        print(f"bagualu: failed: {what}; see whether there is room and whether it can be written", file=sys.stderr)
        code, document = FAILED, {"ended": "failed", "cause": what}
    except KeyboardInterrupt:
        print("bagualu: failed: interrupted before the workers started; nothing was trained", file=sys.stderr)
        code, document = FAILED, {"ended": "failed", "cause": "interrupted before the workers started"}
    if "--json" in words and document is not None:
        print(json.dumps(document, indent=2))
    return code


def _run(words: list[str], entrypoint: str | None) -> tuple[int, Any]:
    """Exit code, and the document for --json."""
    request = usage.read(words)
    if request.help:
        print(usage.page(request.verb))
        return DONE, None
    if request.verb == "checkpoint":
        return checkpoint(request)
    if request.verb == "schedule":
        return schedule(request)
    # Deferred, so that help needs neither Hydra nor, in the verbs, torch.
    if request.print_recipe:
        from bagualu.launch.show import show_recipe

        return show_recipe(request)
    if request.verb == "slurm":
        from bagualu.launch.slurm import slurm

        return slurm(request)
    if request.verb == "rehearse":
        from bagualu.launch.rehearse import rehearse

        return rehearse(request, entrypoint)
    from bagualu.launch.train import train

    return train(request, entrypoint)


if __name__ == "__main__":
    sys.exit(main())

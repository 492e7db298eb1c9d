"""`bagualu evaluate`: how well the model of a run predicts text, in any layout. Torch is imported only when workers start."""

import sys
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from bagualu.comm.errors import RecipeError
from bagualu.launch.verbs.command_line import SEVERAL, CommandLine
from bagualu.launch.verbs.model_ranks import call, on_this_machine, report_failure
from bagualu.launch.verbs.own_words import split_words
from bagualu.launch.verbs.question import whole
from bagualu.trainer.generation.evaluate_request import EvaluateRequest
from bagualu.trainer.generation.find import compose_layout, find_model
from bagualu.trainer.process.failure import DONE
from bagualu.trainer.recipe.compose import parse
from bagualu.trainer.recipe.config import Recipe

_ENTRYPOINT = "bagualu.trainer.generation.evaluate:evaluate_on_ranks"
_LENGTH = "data.sequence_length"
_DATA_KEYS = ("data.source", _LENGTH, "data.cache", "train.micro_batch")
_SEQUENCES = "sequences"


def evaluate(request: CommandLine) -> tuple[int, Any]:
    """Evaluates what the command line asks for and prints it. Returns the exit code and the object that --json prints: `loss` (nats
    per token), `perplexity`, `bits_per_byte` (null for random tokens), `tokens`, `sequences`, `sequence_length`, `seconds`,
    `source`, `checkpoint` and `layout`. Raises RecipeError."""
    if not request.overrides or request.overrides[0].partition("=")[0] in ("recipe", "run.dir"):
        raise RecipeError("evaluate takes a run directory or a checkpoint first; e.g. bagualu evaluate runs/tiny")
    given, *words = request.overrides
    own, overrides = split_words(words, lambda key: key == _SEQUENCES)
    trained = find_model(Path(given).expanduser())
    with tempfile.TemporaryDirectory(prefix="bagualu-evaluate-") as folder:
        recipe = compose_layout("evaluate", trained, overrides, folder, SEVERAL["evaluate"], _DATA_KEYS)
        own_data = recipe.data.source == trained.recipe.data.source
        context = None if own_data or _gives(overrides, _LENGTH) else trained.context
        if not own_data:
            recipe = _for_other_text(recipe, context)
        recipe = on_this_machine(recipe)
        EvaluateRequest(
            checkpoint=str(trained.checkpoint.resolve()),
            run_dir=str(trained.run_dir),
            tokenizer=None if trained.tokenizer is None else str(trained.tokenizer.resolve()),
            own_data=own_data,
            kept=trained.recipe.train.validation_sequences > 0 or trained.recipe.data.split == "files",
            context=context,
            sequences=whole(_SEQUENCES, own[_SEQUENCES]) if _SEQUENCES in own else None,
        ).save(Path(folder))
        ended = call(recipe, _ENTRYPOINT, request.json)
    if ended.failure is not None:
        return report_failure(ended.failure)
    assert ended.summary is not None
    document = {
        **ended.summary,
        "source": recipe.data.source,
        "checkpoint": str(trained.checkpoint),
        "layout": str(recipe.validate(recipe.world_size())),
    }
    if not request.json:
        print(_text(document))
    print(
        f"bagualu: {document['tokens']:,} tokens in {document['seconds']:.1f} s, {document['layout']}", file=sys.stderr, flush=True
    )
    return DONE, document


def _for_other_text(recipe: Recipe, context: int | None) -> Recipe:
    """Returns the recipe for checks before the ranks know how long the text is: all of it is evaluated, and with a `context` any
    text is long enough."""
    length = recipe.data.sequence_length if context is None else 1
    return replace(recipe, data=replace(recipe.data, sequence_length=length), train=replace(recipe.train, validation_sequences=0))


def _gives(overrides: Sequence[str], key: str) -> bool:
    return any(override.key_or_group == key for override in parse(overrides))


def _text(document: dict[str, Any]) -> str:
    sequences = f"{document['sequences']:,} sequences of {document['sequence_length']:,} tokens"
    rows = [
        ("loss", f"{document['loss']:.4f} nats/token"),
        ("perplexity", f"{document['perplexity']:.4g}"),
        ("tokens", f"{document['tokens']:,} in {sequences}, from {document['source']}"),
        ("checkpoint", document["checkpoint"]),
    ]
    if document["bits_per_byte"] is not None:
        rows.insert(2, ("text", f"{document['bits_per_byte']:.3f} bits/byte"))
    return "\n".join(f"{name:<12}{value}" for name, value in rows)

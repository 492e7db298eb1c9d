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
from bagualu.trainer.data.config import CHAT, RANDOM, WHOLE
from bagualu.trainer.data.corpus_cache import cache_folder
from bagualu.trainer.data.formats import OF_TOKENS, format_of
from bagualu.trainer.generation.evaluate_request import EvaluateRequest
from bagualu.trainer.generation.find import TrainedModel, compose_layout, find_model
from bagualu.trainer.process.failure import DONE
from bagualu.trainer.recipe.compose import parse
from bagualu.trainer.recipe.config import Recipe

_ENTRYPOINT = "bagualu.trainer.generation.evaluate:evaluate_on_ranks"
_LENGTH = "data.sequence_length"
_READING = tuple(f"data.{name}" for name in ("format", "field", "token_dtype"))
"""Keys that say how a source is read, which a run has said of its own."""
_DATA_KEYS = ("data.source", *_READING, "data.end_token", "data.packing", _LENGTH, "data.cache", "train.micro_batch")
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
        then = trained.recipe.data
        own_data = (recipe.data.source, recipe.data.blend) == (then.source, then.blend)
        context = None
        if own_data:
            _refuse_reading(overrides)
        else:
            recipe, context = _for_other_data(recipe, trained, overrides)
        recipe = on_this_machine(recipe)
        EvaluateRequest(
            checkpoint=str(trained.checkpoint.resolve()),
            run_dir=str(trained.run_dir),
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
        "source": ", ".join(entry.source for entry in recipe.data.blend_entries) or recipe.data.source,
        "checkpoint": str(trained.checkpoint),
        "layout": str(recipe.validate(recipe.world_size())),
    }
    if not request.json:
        print(_text(document))
    print(
        f"bagualu: {document['tokens']:,} tokens in {document['seconds']:.1f} s, {document['layout']}", file=sys.stderr, flush=True
    )
    return DONE, document


def _refuse_reading(overrides: Sequence[str]) -> None:
    """Raises RecipeError for a key that says how the data of the run are to be read."""
    if key := next((key for key in _READING if _gives(overrides, key)), None):
        raise RecipeError(
            f"{key} says how other data are read, and those of the run are read as it has read them; give data.source too"
        )


def _for_other_data(recipe: Recipe, trained: TrainedModel, overrides: Sequence[str]) -> tuple[Recipe, int | None]:
    """Returns the recipe for data of which all are evaluated, read with the tokenizer of the run if they are text; and how long
    sequences may be, if the length of the data decides, which the ranks will know: until then they are taken to be short. Raises
    RecipeError without a tokenizer."""
    data = recipe.data
    if data.format == CHAT and not _gives(overrides, "data.packing"):
        data = replace(data, packing=WHOLE)
    kind = RANDOM if data.source == RANDOM else format_of(data.source, data.format, [str(cache_folder(data)), str(trained.run_dir)])
    if kind not in (RANDOM, *OF_TOKENS):
        if trained.tokenizer is None:
            raise RecipeError(f"data.source={data.source} is text, and the run of {trained.checkpoint} keeps no tokenizer.json to "
                              "read it with; leave data.source out")  # fmt: skip
        data = replace(data, tokenizer=str(trained.tokenizer.resolve()))
    context = None if _gives(overrides, _LENGTH) or data.packing == WHOLE else trained.context
    if not _gives(overrides, _LENGTH):
        data = replace(data, sequence_length=1 if context else trained.context)
    return replace(recipe, data=data, train=replace(recipe.train, validation_sequences=0)), context


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

"""What a rank does for `bagualu evaluate`: the function that the launcher starts on each worker in place of the trainer."""

import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from bagualu.comm.errors import RecipeError
from bagualu.comm.group import Communicator
from bagualu.fault_tolerance.checkpoint.reading.load import Checkpoint
from bagualu.trainer.data.batches import Batches
from bagualu.trainer.data.blend import changed_source, read_periods
from bagualu.trainer.data.config import RANDOM, WHOLE, DataConfig
from bagualu.trainer.data.corpus import prepare
from bagualu.trainer.data.tokenised import Corpus
from bagualu.trainer.generation.evaluate_request import EvaluateRequest
from bagualu.trainer.generation.score import text_loss
from bagualu.trainer.generation.stages import load_stages
from bagualu.trainer.recipe.config import Recipe
from bagualu.trainer.recovery.state import FINGERPRINT

RANDOM_SEQUENCES = 64
"""How many sequences of random tokens, which never run out, are evaluated unless a number is given."""


def evaluate_on_ranks(
    recipe: Recipe, communicator: Communicator, stop: Callable[[], bool], scratch: Path | None = None
) -> dict[str, Any]:
    """Returns what `TextLoss.as_dict` does for the text that the request in run.dir asks for, the number of `sequences`, their
    `sequence_length` and the `seconds` that they took. Raises RecipeError if there is not one sequence."""
    request = EvaluateRequest.load(Path(recipe.run.dir))
    corpus = _own(recipe, request) if request.own_data else _other(recipe, request)
    recipe = replace(recipe, data=_fitting(recipe.data, corpus, request))
    batches = Batches(corpus, recipe.data, recipe.run.seed)
    have = batches.validation_count
    count = min(have, request.sequences or (RANDOM_SEQUENCES if recipe.data.source == RANDOM else have))
    if not count:
        raise RecipeError(f"the text of data.source={recipe.data.source} to evaluate has {len(corpus.validation)} tokens, not one "
                          f"sequence of data.sequence_length={recipe.data.sequence_length}; give a smaller one")  # fmt: skip
    stages = load_stages(recipe, communicator, Path(request.checkpoint))
    numbers = [index * have // count for index in range(count)]
    started = time.perf_counter()
    loss = text_loss(stages, lambda number: batches.validation(number, 1), numbers, corpus.token_bytes)
    about = {"sequences": count, "sequence_length": recipe.data.sequence_length}
    return {**loss.as_dict(), **about, "seconds": time.perf_counter() - started}


def _fitting(data: DataConfig, corpus: Corpus, request: EvaluateRequest) -> DataConfig:
    """Returns the section with sequences as long as the model's context, or as other text if that is shorter; with their length as
    it is if it was given, and for the text of the run. Sequences of whole documents are no longer than all of them together: the
    rest would be padding, in masks too."""
    if request.context is None:
        shorter = data.packing == WHOLE and not request.own_data
        return replace(data, sequence_length=max(1, min(data.sequence_length, len(corpus.validation)))) if shorter else data
    longest = request.context if data.source == RANDOM else min(request.context, len(corpus.validation) - 1)
    return replace(data, sequence_length=max(1, longest))


def _own(recipe: Recipe, request: EvaluateRequest) -> Corpus:
    """Returns the corpus of the run. Raises RecipeError if it keeps nothing for validation, or if its text has changed, so that
    another part of it would be kept."""
    if not request.kept and recipe.data.source != RANDOM:
        raise RecipeError("the run keeps no text for validation (train.validation_sequences=0); give other text as data.source")
    corpus = prepare(recipe.data, recipe.model.vocab, validation=True, run_dir=request.run_dir)
    trained = Checkpoint(Path(request.checkpoint)).metadata.get("identity", {}).get(FINGERPRINT, corpus.fingerprint)
    if corpus.blend:
        _require_unchanged(corpus, request)
    elif trained != corpus.fingerprint:
        raise RecipeError(f"the text of data.source={recipe.data.source} is not the one that the run was trained on ({FINGERPRINT} "
                          f"{corpus.fingerprint} and {trained}), so it has read some of it; put it back, or give other text, "
                          "data.source=FOLDER")  # fmt: skip
    return corpus


def _require_unchanged(corpus: Corpus, request: EvaluateRequest) -> None:
    """Raises RecipeError if a source of the run's blend has changed."""
    saved = read_periods(Checkpoint(Path(request.checkpoint)).metadata.get("blend"))
    now = {part.source: part.corpus.fingerprint for part in corpus.blend}
    if saved and (source := changed_source(saved, now)):
        raise RecipeError(f"the tokens of {source} in data.blend are not those that the run was trained on, so it has read some of "
                          "them; put them back, or give other data, data.source=PATH")  # fmt: skip


def _other(recipe: Recipe, request: EvaluateRequest) -> Corpus:
    """Returns all of data.source, with all of it for validation."""
    if recipe.data.source == RANDOM:
        return prepare(recipe.data, recipe.model.vocab)
    corpus = prepare(recipe.data, recipe.model.vocab, validation=False, run_dir=request.run_dir)
    documents, whole = corpus.documents, corpus.whole
    return replace(
        corpus,
        validation=corpus.train,
        documents=None if documents is None else (documents[0], documents[0]),
        whole=None if whole is None else (whole[0], whole[0]),
    )

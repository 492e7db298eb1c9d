"""What a rank does for `bagualu evaluate`: the function that the launcher starts on each worker in place of the trainer."""

import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from bagualu.comm.errors import RecipeError
from bagualu.comm.group import Communicator
from bagualu.fault_tolerance.checkpoint.reading.load import Checkpoint
from bagualu.trainer.data.batches import Batches
from bagualu.trainer.data.build import documents
from bagualu.trainer.data.config import RANDOM
from bagualu.trainer.data.corpus import Corpus, prepare
from bagualu.trainer.data.formats import OF_TOKENS, format_of
from bagualu.trainer.data.prepared import token_dtype
from bagualu.trainer.data.records import OF_RECORDS
from bagualu.trainer.data.sources import find_files
from bagualu.trainer.data.split import NOTHING
from bagualu.trainer.data.tokenizer import END_OF_FILE, END_OF_FILE_TOKEN, Encoder, load_tokenizer, token_bytes
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
    """Returns what `TextLoss.as_dict` does for the text that the request in run.dir asks for, the number of `sequences` and the
    `seconds` that they took. Raises RecipeError if there is not one sequence."""
    request = EvaluateRequest.load(Path(recipe.run.dir))
    corpus = _own(recipe, request) if request.own_data else _other(recipe, request)
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
    return {**loss.as_dict(), "sequences": count, "seconds": time.perf_counter() - started}


def _own(recipe: Recipe, request: EvaluateRequest) -> Corpus:
    """Returns the corpus of the run. Raises RecipeError if it keeps nothing for validation, or if its text has changed, so that
    another part of it would be kept."""
    if not request.kept and recipe.data.source != RANDOM:
        raise RecipeError("the run keeps no text for validation (train.validation_sequences=0); give other text as data.source")
    corpus = prepare(recipe.data, recipe.model.vocab, validation=True, run_dir=request.run_dir)
    trained = Checkpoint(Path(request.checkpoint)).metadata.get("identity", {}).get(FINGERPRINT, corpus.fingerprint)
    if trained != corpus.fingerprint and not corpus.blend:
        raise RecipeError(f"the text of data.source={recipe.data.source} is not the one that the run was trained on ({FINGERPRINT} "
                          f"{corpus.fingerprint} and {trained}), so it has read some of it; put it back, or give other text, "
                          "data.source=FOLDER")  # fmt: skip
    return corpus


def _other(recipe: Recipe, request: EvaluateRequest) -> Corpus:
    """Returns all text of data.source, in the tokens of the run's tokenizer. Raises RecipeError without one."""
    vocab, source = recipe.model.vocab, recipe.data.source
    if source == RANDOM:
        return prepare(recipe.data, vocab)
    kind = format_of(source, None, [request.run_dir])
    if kind in OF_TOKENS:
        return _all_of(prepare(recipe.data, vocab, validation=False, run_dir=request.run_dir))
    if request.tokenizer is None:
        raise RecipeError(f"data.source={source} is text, and the run of {request.checkpoint} keeps no tokenizer.json to read it "
                          "with; leave data.source out")  # fmt: skip
    tokenizer = load_tokenizer(Path(request.tokenizer))
    if kind in OF_RECORDS or tokenizer.token_to_id(END_OF_FILE) != END_OF_FILE_TOKEN:  # not one that was trained here
        own = replace(recipe.data, tokenizer=request.tokenizer, format=kind)
        return _all_of(prepare(own, vocab, validation=False, run_dir=request.run_dir))
    encoder, dtype = Encoder(tokenizer, token_dtype(vocab)), np.dtype(token_dtype(vocab))
    end = np.array([END_OF_FILE_TOKEN], dtype).tobytes()
    texts = documents(find_files(source, [request.run_dir]), NOTHING, source)
    joined = b"".join(b"".join(map(encoder.encode, text.part.pieces())) + end for text in texts)
    tokens = np.frombuffer(joined, dtype)
    return Corpus(vocab, tokens, tokens, token_bytes(tokenizer), "", Path(request.tokenizer), NOTHING.kind)


def _all_of(corpus: Corpus) -> Corpus:
    """Returns the corpus with all tokens for validation."""
    return replace(corpus, validation=corpus.train)

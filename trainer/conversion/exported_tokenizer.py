"""Finds the tokenizer that goes with an exported model: that of the run's text, or that of the model the run began with."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bagualu.comm.errors import RecipeError
from bagualu.fault_tolerance.run_directory import TOKENIZER, RunDirectory
from bagualu.trainer.conversion.besides import kept_config
from bagualu.trainer.data.tokenizer import load_tokenizer
from bagualu.trainer.data.tokenizer_files import end_token_of
from bagualu.trainer.models.hugging_face.config import OF_TOKENS


@dataclass(frozen=True)
class ExportedTokenizer:
    """A tokenizer and what belongs to it."""

    folder: Path
    """Where its files lie, if there are any, by the names that Hugging Face gives them."""
    ids: dict[str, Any]
    """The ids of special tokens, by their fields in config.json; only those that are known."""
    end: str | None
    """The token that ends a text, if the run's own text has one."""


def find_tokenizer(run: RunDirectory) -> ExportedTokenizer:
    """Returns the tokenizer of the run's text, which is the one that the run keeps itself; if that is the one of the model with
    which the run began, with all that came with it. Raises RecipeError if it cannot be read, OSError."""
    before = run.hugging_face / TOKENIZER
    if not run.tokenizer.is_file() or (before.is_file() and before.read_bytes() == run.tokenizer.read_bytes()):
        config = kept_config(run)
        return ExportedTokenizer(run.hugging_face, {name: config[name] for name in OF_TOKENS if name in config}, None)
    try:
        tokenizer = load_tokenizer(run.tokenizer)
    except Exception as error:  # the library raises Exception itself
        why = (str(error).splitlines() or [""])[0]
        raise RecipeError(f"{run.tokenizer} cannot be read ({why}); put it back, or remove it to export without one") from error
    end = end_token_of(tokenizer, run.tokenizer)
    if end is None:
        return ExportedTokenizer(run.path, {}, None)
    return ExportedTokenizer(run.path, {"eos_token_id": end}, tokenizer.id_to_token(end))

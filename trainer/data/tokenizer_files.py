"""Tokenizer files of the Hugging Face library tokenizers, made elsewhere, and what tokens of theirs mean."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from bagualu.comm.errors import RecipeError
from bagualu.fault_tolerance.run_directory import GENERATION, MODEL, TOKENIZER, TOKENIZER_CONFIG, RunDirectory
from bagualu.trainer.data.tokenizer import load_tokenizer

_USUAL_ENDS = ("<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>", "<|endoffile|>")


@dataclass(frozen=True)
class GivenTokenizer:
    """A tokenizer, its file, and the id that ends each document."""

    tokenizer: Tokenizer
    path: Path
    end: int


def open_tokenizer(given: str, end: int | None, vocab: int) -> GivenTokenizer:
    """Returns the tokenizer that data.tokenizer names, a tokenizer.json or the folder of one. `end`: data.end_token; by default the
    eos_token of the file tokenizer_config.json beside it. Raises RecipeError if it cannot be read, has ids beyond a vocabulary of
    `vocab` entries, or ends documents by no id."""
    path = Path(given, TOKENIZER) if Path(given).is_dir() else Path(given)
    try:
        tokenizer = load_tokenizer(path)
    except Exception as error:  # the library raises Exception itself
        why = (str(error).splitlines() or [""])[0]
        raise RecipeError(f"data.tokenizer={given} cannot be read ({why}); give a tokenizer.json of Hugging Face's tokenizers, or "
                          "its folder") from error  # fmt: skip
    entries = max(tokenizer.get_vocab(with_added_tokens=True).values(), default=-1) + 1
    if entries > vocab:
        raise RecipeError(
            f"data.tokenizer={given} has {entries} tokens, but model.vocab={vocab}; give model.vocab={entries} or more"
        )
    if end is not None and end >= vocab:
        raise RecipeError(f"data.end_token={end} is not in model.vocab={vocab}; give an id below")
    found = end_token_of(tokenizer, path) if end is None else end
    if found is None:
        raise RecipeError(f"data.tokenizer={given} does not say which token ends a document; give data.end_token=ID")
    return GivenTokenizer(tokenizer, path, found)


def end_token_of(tokenizer: Tokenizer, path: Path) -> int | None:
    """Returns the token that ends a text: the eos_token of tokenizer_config.json beside `path`, the tokenizer's file, or one with a
    usual name; None if it has neither."""
    ids = [tokenizer.token_to_id(name) for name in (special_token(path, "eos_token"), *_USUAL_ENDS) if name]
    return next((index for index in ids if index is not None), None)


def end_tokens_of(tokenizer: Tokenizer, path: Path) -> list[int]:
    """Returns all tokens that end a text: that of `end_token_of` first, then those that generation_config.json lists, beside `path`
    or beside the same tokenizer in the folder of the model of Hugging Face with which a run began; without a
    generation_config.json, those of config.json."""
    ends = [end_token_of(tokenizer, path)]
    before = RunDirectory(path.parent).hugging_face
    same = (before / path.name).is_file() and (before / path.name).read_bytes() == path.read_bytes()
    for folder in (path.parent, *([before] if same else [])):
        name = GENERATION if (folder / GENERATION).is_file() else MODEL
        listed = fields_of(folder / name).get("eos_token_id")
        ends += [end for end in (listed if isinstance(listed, list) else [listed]) if type(end) is int]
    return list(dict.fromkeys(end for end in ends if end is not None))


def begin_token_of(tokenizer: Tokenizer, path: Path) -> int | None:
    """Returns the token that begins a text: the bos_token of tokenizer_config.json beside `path`; None if it has none."""
    name = special_token(path, "bos_token")
    return tokenizer.token_to_id(name) if name else None


def special_token(path: Path, key: str) -> str | None:
    """Returns the text of the special token `key` of tokenizer_config.json beside the tokenizer `path`; None if it has none."""
    token = fields_of(path.parent / TOKENIZER_CONFIG).get(key)
    text = token.get("content") if isinstance(token, dict) else token
    return text if isinstance(text, str) else None


def fields_of(path: Path) -> dict[str, Any]:
    """Returns the object in a file of JSON; {} if there is none."""
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return fields if isinstance(fields, dict) else {}


def bytes_of_tokens(tokenizer: Tokenizer, vocab: int) -> NDArray[np.int64]:
    """Returns the number of bytes of text that each token stands for [vocab]; 0 for special tokens and for ids without a token."""
    content = json.loads(tokenizer.to_str())
    byte_level = '"ByteLevel"' in json.dumps([content.get("decoder"), content.get("pre_tokenizer")])
    sizes = np.zeros(vocab, np.int64)
    for token, index in tokenizer.get_vocab(with_added_tokens=False).items():
        if byte_level:  # one letter of its alphabet stands for one byte
            sizes[index] = len(token)
        elif len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
            sizes[index] = 1
        else:
            sizes[index] = len(token.replace("▁", " ").encode())
    for index, added in tokenizer.get_added_tokens_decoder().items():
        sizes[index] = 0 if added.special else len(added.content.encode())
    return sizes

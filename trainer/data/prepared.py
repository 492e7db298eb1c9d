"""The files of a prepared corpus, and whether they are what was prepared."""

from pathlib import Path
from typing import Any

import numpy as np
import xxhash
from numpy.typing import NDArray

_PARTS = ("tokenizer.json", "train.bin", "validation.bin")
_PORTION = 2**20


def token_dtype(vocab: int) -> str:
    """How the tokens of a vocabulary are stored."""
    return "uint16" if vocab <= 2**16 else "uint32"


def fingerprint(folder: Path) -> str:
    """Hash of everything in `folder` that a model gets to see. Raises OSError."""
    whole = xxhash.xxh3_128()
    for name in _PARTS:
        part = xxhash.xxh3_128()
        with open(folder / name, "rb") as stream:
            while portion := stream.read(_PORTION):
                part.update(portion)
        whole.update(part.digest())
    return str(whole.hexdigest())


def read_tokens(path: Path, vocab: int) -> NDArray[Any]:
    """The tokens of the file `path`, mapped. Raises OSError, and ValueError for a token that the vocabulary does not have."""
    dtype = token_dtype(vocab)
    tokens: NDArray[Any] = np.memmap(path, dtype, mode="r") if path.stat().st_size else np.zeros(0, dtype)
    for begin in range(0, len(tokens), _PORTION):
        if (largest := int(tokens[begin : begin + _PORTION].max())) >= vocab:
            raise ValueError(f"{path.name} has token {largest}, but there are {vocab}")
    return tokens

"""The `data` section of a recipe."""

from dataclasses import dataclass, field

from bagualu.comm.checks import require_at_least, require_at_most, require_known_home, require_text
from bagualu.comm.errors import RecipeError

LARGEST = 2**24
"""The most sequences per step, and the most tokens per sequence. Every rank holds the indices of all sequences of a step."""
SMALLEST_VOCAB = 256 + 1
"""One entry for every byte, and one for the end of a file."""
RANDOM = "random"
STDLIB = "stdlib"
SPLITS = ("share", "files")
FORMATS = ("text", "megatron", "llmc", "olmo")
TOKEN_DTYPES = ("uint16", "uint32")


@dataclass
class DataConfig:
    """`data.*` of a recipe."""

    source: str = field(default=STDLIB, metadata={"path": True})
    """stdlib: the source code of Python's own standard library; random: uniform random tokens; else a file or a folder of files, of
    text or of token ids (`format`). Links are followed, and each file and folder is read once. Folders of runs and of prepared
    corpora, and names that start with a dot, are skipped."""
    format: str | None = field(default=None, metadata={"example": "megatron"})
    """The format of the source. text: UTF-8 files. Files of token ids: megatron, PREFIX.bin with PREFIX.idx, of which the source is
    PREFIX; llmc, the .bin files of llm.c and nanoGPT; olmo, .npy files. Default: by the beginning and ending of the files."""
    token_dtype: str | None = field(default=None, metadata={"example": "uint32"})
    """The dtype of the ids in files of tokens that do not say it (nanoGPT, OLMo): uint16 | uint32. Default: uint16 if all ids of
    model.vocab fit."""
    sequence_length: int = 256
    """The number of tokens that a sequence predicts; it reads one more."""
    global_batch: int = 16
    """Sequences per optimizer step, over all ranks."""
    validation_fraction: float = 0.05
    """Share of the tokens kept for validation, to within a factor of 2 (data.split=share); nothing is kept with
    train.validation_sequences=0, unless data.split=files. Of files of token ids, the last ones are kept."""
    validation: str | None = field(default=None, metadata={"path": True, "example": "tokens/validation.bin"})
    """Files of token ids to validate with, in place of a share of a source of token ids. Default: a share of the source."""
    split: str = "share"
    """share: keeps files chosen by a hash of their path, and cuts one of them if whole files would miss the share by more than a
    factor of 2. files: keeps whole files whatever share they are (a single file is cut), even with train.validation_sequences=0,
    as earlier versions did."""
    cache: str | None = field(default=None, metadata={"path": True})
    """Folder of prepared corpora and measured costs; by default $XDG_CACHE_HOME/bagualu or ~/.cache/bagualu."""

    def validate(self) -> None:
        require_text("data", self, source=STDLIB)
        require_known_home("data", self, "source", "cache", "validation")
        for name in ("source", "cache", "validation"):
            if not _is_utf8(getattr(self, name) or ""):
                raise RecipeError(f"data.{name}={getattr(self, name)!a} has a name that is not UTF-8; rename it")
        require_at_least(1, "data", self, "sequence_length", "global_batch")
        require_at_most(LARGEST, "data", self, "sequence_length", "global_batch")
        if not 0 < self.validation_fraction < 1:
            raise RecipeError(f"data.validation_fraction={self.validation_fraction} must lie between 0 and 1, e.g. 0.05")
        if self.split not in SPLITS:
            raise RecipeError(f"data.split={self.split} is unknown; give one of {', '.join(SPLITS)}")
        self._validate_format()

    def _validate_format(self) -> None:
        for name, choices in (("format", FORMATS), ("token_dtype", TOKEN_DTYPES)):
            if getattr(self, name) not in (None, *choices):
                raise RecipeError(
                    f"data.{name}={getattr(self, name)} is unknown; give one of {', '.join(choices)}, or leave it out"
                )
        made = self.source in (STDLIB, RANDOM)
        for name in ("format", "token_dtype", "validation"):
            if made and (given := getattr(self, name)) is not None:
                what = f"data.{name}={given} is for files, and data.source={self.source} has none"
                raise RecipeError(f"{what}; leave it out, or give data.source=PATH")


def _is_utf8(name: str) -> bool:
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True


def require_vocab(vocab: int) -> None:
    """Raises RecipeError if `vocab`, a number of entries, is too small for text."""
    if vocab < SMALLEST_VOCAB:
        raise RecipeError(f"model.vocab={vocab} cannot hold every byte and the end of a file; "
                          f"give model.vocab={SMALLEST_VOCAB} or more")  # fmt: skip

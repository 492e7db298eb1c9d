"""The `data` section of a recipe."""

from collections.abc import Collection
from dataclasses import dataclass, replace
from dataclasses import field as option
from typing import Any

from bagualu.comm.checks import require_at_least, require_at_most, require_known_home
from bagualu.comm.errors import RecipeError
from bagualu.trainer.data.blend import EXAMPLE, BlendEntry

LARGEST = 2**24
"""The most sequences per step, and the most tokens per sequence. Every rank holds the indices of all sequences of a step."""
SMALLEST_VOCAB = 256 + 1
"""One entry for every byte, and one for the end of a file."""
RANDOM = "random"
STDLIB = "stdlib"
SPLITS = ("share", "files")
CHAT = "chat"
FORMATS = ("text", "jsonl", "parquet", "saved", "hub", CHAT, "megatron", "llmc", "olmo")
TOKEN_DTYPES = ("uint16", "uint32")
STREAM, DOCUMENTS, WHOLE = "stream", "documents", "whole"
PACKINGS = (STREAM, DOCUMENTS, WHOLE)
_OF_A_SOURCE = ("format", "field", "token_dtype", "tokenizer", "end_token", "validation", "packing", "blend", "split")
"""Fields that say how a certain source is read."""


@dataclass
class DataConfig:
    """`data.*` of a recipe."""

    source: str = option(default=STDLIB, metadata={"path": True})
    """stdlib: the source code of Python's own standard library; random: uniform random tokens; else a file or a folder of files,
    of text, of records with text, or of token ids (`format`); with data.format=hub a name on the Hugging Face hub. Links are
    followed, and each file and folder is read once. Folders of runs and of prepared corpora, and names that start with a dot, are
    skipped."""
    format: str | None = option(default=None, metadata={"example": "megatron"})
    """The format of the source. text: UTF-8 files. jsonl: an object on each line. parquet. saved: a folder that save_to_disk of
    Hugging Face's datasets wrote. hub: owner/name or owner/name:subset of a dataset there. chat: conversations, one on
    each line of JSON, of which only the answers are trained on. Files of token ids: megatron, PREFIX.bin
    with PREFIX.idx, of which the source is PREFIX; llmc, the .bin files of llm.c and nanoGPT; olmo, .npy files. Default: by the
    beginning and ending of the files."""
    token_dtype: str | None = option(default=None, metadata={"example": "uint32"})
    """The dtype of the ids in files of tokens that do not say it (nanoGPT, OLMo): uint16 | uint32. Default: uint16 if all ids of
    model.vocab fit."""
    field: str = "text"
    """The field of records that holds the text, or with data.format=chat the messages (then `messages` unless another is given)."""
    tokenizer: str | None = option(default=None, metadata={"path": True, "example": "llama/tokenizer.json"})
    """A tokenizer.json of Hugging Face's tokenizers, or its folder, with which text becomes tokens, or became the ids of the
    source. Default: a tokenizer with exactly model.vocab tokens is trained on text."""
    packing: str = STREAM
    """How documents fill sequences, which are consecutive tokens of all documents, one after the other. stream: tokens attend to
    all tokens before them in their sequence. documents: only to those of their own document, whose positions count from 0, and no
    token is predicted from another document. whole: as documents, but sequences hold whole documents of records, put together so
    that little room is left; what is longer than a sequence is cut off."""
    end_token: int | None = option(default=None, metadata={"example": "50256"})
    """The id that ends each document: in files of token ids, for data.packing=documents (Megatron's index says it without); with
    data.tokenizer, the id that is put after each document. Default: none; the eos_token of the tokenizer."""
    sequence_length: int = 256
    """The number of tokens that a sequence predicts; it reads one more."""
    global_batch: int = 16
    """Sequences per optimizer step, over all ranks."""
    validation_fraction: float = 0.05
    """Share of the tokens kept for validation, to within a factor of 2 (data.split=share); nothing is kept with
    train.validation_sequences=0, unless data.split=files. Of files of token ids, the last ones are kept."""
    validation: str | None = option(default=None, metadata={"path": True, "example": "tokens/validation.bin"})
    """A source to validate with, in place of a share of data.source: of token ids if that is, else of text or records. Default: the
    split validation or test of a saved dataset or of the hub, else a share of the source."""
    split: str = "share"
    """share: keeps files chosen by a hash of their path, and cuts one of them if whole files would miss the share by more than a
    factor of 2. files: keeps whole files whatever share they are (a single file is cut), even with train.validation_sequences=0,
    as earlier versions did."""
    blend: list[Any] = option(default_factory=list, metadata={"example": EXAMPLE})
    """Sources to mix, each with a weight, in place of data.source, e.g. [{source: a.bin, weight: 0.7}, {source: b.bin, weight:
    0.3}]: files of token ids and, with data.tokenizer, text; format and validation may be given for each. A run that resumes may
    change the weights, add sources and drop some."""
    workers: int = 1
    """Threads of each rank that read the samples of the next steps, one step each, while a step is computed; 0: samples are read
    when the step begins."""
    cache: str | None = option(default=None, metadata={"path": True})
    """Folder of prepared corpora and measured costs; by default $XDG_CACHE_HOME/bagualu or ~/.cache/bagualu."""

    def validate(self) -> None:
        require_known_home("data", self, "source", "cache", "validation", "tokenizer")
        for name in ("source", "cache", "validation", "tokenizer"):
            if not _is_utf8(getattr(self, name) or ""):
                raise RecipeError(f"data.{name}={getattr(self, name)!a} has a name that is not UTF-8; rename it")
        require_at_least(1, "data", self, "sequence_length", "global_batch")
        require_at_least(0, "data", self, "workers")
        require_at_most(64, "data", self, "workers")
        require_at_most(LARGEST, "data", self, "sequence_length", "global_batch")
        if not 0 < self.validation_fraction < 1:
            raise RecipeError(f"data.validation_fraction={self.validation_fraction} must lie between 0 and 1, e.g. 0.05")
        if self.split not in SPLITS:
            raise RecipeError(f"data.split={self.split} is unknown; give one of {', '.join(SPLITS)}")
        self._validate_format()
        self._validate_packing()
        self._validate_blend()

    def _validate_format(self) -> None:
        for name, choices in (("format", FORMATS), ("token_dtype", TOKEN_DTYPES)):
            if getattr(self, name) not in (None, *choices):
                raise RecipeError(
                    f"data.{name}={getattr(self, name)} is unknown; give one of {', '.join(choices)}, or leave it out"
                )
        made = self.source in (STDLIB, RANDOM) and not self.blend
        for name in ("format", "token_dtype", "validation"):
            if made and (given := getattr(self, name)) is not None:
                what = f"data.{name}={given} is for files, and data.source={self.source} has none"
                raise RecipeError(f"{what}; leave it out, or give data.source=PATH")

    def _validate_packing(self) -> None:
        if self.packing not in PACKINGS:
            raise RecipeError(f"data.packing={self.packing} is unknown; give one of {', '.join(PACKINGS)}")
        if self.packing != STREAM and self.source == RANDOM:
            raise RecipeError(f"data.packing={self.packing} needs documents, which random tokens are not; give data.packing=stream")
        if self.format == CHAT:
            self.require_chat()
        made = self.source in (STDLIB, RANDOM) and not self.blend
        if self.end_token is not None and self.tokenizer is None and (self.packing != DOCUMENTS or made):
            raise RecipeError(f"data.end_token={self.end_token} is for files of token ids with data.packing=documents, and for "
                              "text with data.tokenizer; leave it out")  # fmt: skip
        if self.tokenizer is not None and self.source == RANDOM:
            raise RecipeError(f"data.tokenizer={self.tokenizer} is for text, and data.source=random has none; leave it out")
        require_at_least(0, "data", self, "end_token")

    def require_source(self) -> None:
        """Raises RecipeError unless the recipe says what to train on, which predictions of its time and memory do not need."""
        if not self.source.strip() and not self.blend:
            raise RecipeError("data.source is missing; give the data to train on, a file or a folder of text, of records or "
                              "of token ids, e.g. data.source=my_texts")  # fmt: skip

    def require_chat(self) -> None:
        """Raises RecipeError unless conversations can be read with these keys."""
        if self.packing != WHOLE or self.tokenizer is None:
            raise RecipeError("data.format=chat needs data.packing=whole, so that no conversation is cut in two, and a "
                              "data.tokenizer with a chat template; give both")  # fmt: skip

    @property
    def text_field(self) -> str:
        """The field of records to read."""
        return "messages" if self.format == CHAT and self.field == "text" else self.field

    @property
    def blend_entries(self) -> list[BlendEntry]:
        """`blend`, read. Raises RecipeError for an entry that describes no source."""
        return [BlendEntry.read(entry) for entry in self.blend]

    def of_entry(self, entry: BlendEntry) -> "DataConfig":
        """Returns the section for a source of the blend alone."""
        format, validation = entry.format or self.format, entry.validation
        return replace(self, source=entry.source, format=format, validation=validation, blend=[])

    def of_other_source(self, given: Collection[str] = ()) -> "DataConfig":
        """Returns the section for its source, without what its fields, but for those `given` with that, say of another: as the
        source shows itself, as one stream."""
        default = DataConfig()
        return replace(self, **{name: getattr(default, name) for name in _OF_A_SOURCE if name not in given})

    def without_text(self) -> "DataConfig":
        """Returns a section for random tokens, in sequences and batches of the same size."""
        sizes = {key: getattr(self, key) for key in ("sequence_length", "global_batch", "validation_fraction", "split", "cache")}
        return DataConfig(source=RANDOM, **sizes)

    def _validate_blend(self) -> None:
        sources = [entry.source for entry in self.blend_entries]
        if sources and self.source not in (STDLIB, ""):
            raise RecipeError(f"data.source={self.source} and data.blend exclude each other; leave one of them out")
        if sources and self.validation is not None:
            raise RecipeError(f"data.validation={self.validation} is for one source; give validation in the entries of data.blend")
        if twice := next((source for source in sources if sources.count(source) > 1), None):
            raise RecipeError(f"data.blend has {twice} twice; give one entry, with the sum of the weights")
        for entry in self.blend_entries:
            if entry.source in (STDLIB, RANDOM):
                raise RecipeError(f"data.blend mixes files, and {entry.source} is none; leave it out")


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

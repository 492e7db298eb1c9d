"""Prepare a corpus: read the text through `datasets`, train the tokenizer on the training split, write the tokens.

Slow to import; `corpus` does so only when there is something to prepare.
"""

import json
import os
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import datasets
import numpy as np
from datasets.utils import tqdm
from tokenizers import Tokenizer

from bagualu.comm.errors import RecipeError
from bagualu.trainer.data.config import DataConfig
from bagualu.trainer.data.prepared import fingerprint, token_dtype
from bagualu.trainer.data.sources import TextFile, documents, hash_fraction
from bagualu.trainer.data.tokenizer import END_OF_FILE_TOKEN, Encoder, train_tokenizer

SAMPLE_BYTES_PER_ENTRY = 750
"""Text the tokenizer is trained on, for every entry of its vocabulary: more costs seconds and hardly changes it."""
_DOCUMENTS_AT_ONCE = 256


def build(folder: Path, scratch: Path, config: DataConfig, vocab: int, files: Sequence[TextFile]) -> None:
    """Write a whole corpus into `folder`, every file of it on disk. `scratch` is for what is not needed after that."""
    with _no_progress_bars():
        data = load_documents(config, files, scratch)
        splits = {"train": data.filter(lambda kept: not kept, input_columns="validation"),
                  "validation": data.filter(lambda kept: kept, input_columns="validation")}  # fmt: skip
    tokenizer = train_tokenizer(_sample(splits["train"], vocab * SAMPLE_BYTES_PER_ENTRY), vocab)
    if tokenizer.get_vocab_size() != vocab:
        raise RecipeError(f"the text of data.source={config.source} yields only {tokenizer.get_vocab_size()} tokens; "
                          f"give model.vocab={tokenizer.get_vocab_size()} or more text")  # fmt: skip
    tokenizer.save(str(folder / "tokenizer.json"))
    for name, split in splits.items():
        _write_tokens(folder / f"{name}.bin", split, tokenizer, token_dtype(vocab))
    (folder / "corpus.json").write_text(json.dumps({"fingerprint": fingerprint(folder)}))
    for path in [*folder.iterdir(), folder]:
        _make_durable(path)


def load_documents(config: DataConfig, files: Sequence[TextFile], scratch: Path) -> datasets.Dataset:
    """The documents as a dataset with columns name, text, validation; stored under `scratch`.

    From a generator and not by `load_dataset("text")`, which announces itself to the hub first and rewrites line ends.
    """

    def rows() -> Iterator[dict[str, Any]]:
        for document in documents(config.source, files, config.validation_fraction):
            yield {"name": document.name, "text": document.text, "validation": document.validation}

    try:
        return datasets.Dataset.from_generator(rows, cache_dir=str(scratch / "datasets"), fingerprint="bagualu")
    except datasets.exceptions.DatasetGenerationError as error:
        raise error.__cause__ or error from None


@contextmanager
def _no_progress_bars() -> Iterator[None]:
    """Three bars for one second of work would bury the run's own."""
    tqdm.set_lock(threading.RLock())  # its own is a semaphore too, which a worker that fails or is killed would leave behind
    shown = not datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        if shown:
            datasets.enable_progress_bars()


def _sample(split: datasets.Dataset, most_bytes: int) -> Iterator[str]:
    """Texts in the order of their names' hashes, until `most_bytes` are used up."""
    names = split["name"][:]
    for index in sorted(range(len(names)), key=lambda i: hash_fraction("sample:" + names[i])):
        if most_bytes <= 0:
            return
        text = split[index]["text"][:most_bytes]
        most_bytes -= len(text)
        yield text


def _write_tokens(path: Path, split: datasets.Dataset, tokenizer: Tokenizer, dtype: str) -> None:
    """Tokens of every document, each followed by the end of a file, to `path`."""
    encoder = Encoder(tokenizer)
    with open(path, "wb") as stream:
        for batch in split.iter(batch_size=_DOCUMENTS_AT_ONCE):
            for tokens in encoder.encode(batch["text"]):
                stream.write(np.append(tokens, np.uint32(END_OF_FILE_TOKEN)).astype(dtype).tobytes())


def _make_durable(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)

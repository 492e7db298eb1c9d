"""The tokens of a run, and what is known of them."""

import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from bagualu.trainer.data.blend import Period
from bagualu.trainer.data.documents import Documents, EndToken
from bagualu.trainer.data.mapped import AnyTokens
from bagualu.trainer.data.whole import Documented


@dataclass(frozen=True)
class Corpus:
    """Tokens to train on and to validate with.

    Files are joined, each ended by the end-of-file token. That token stands for 0 bytes: predicting it
    adds to the loss and not to the bytes, so bits per byte is never too low. For `data.source=random` the arrays are
    empty; then, and for files of token ids without data.tokenizer, there is no tokenizer and no token stands for any bytes.
    """

    vocab: int
    train: AnyTokens
    """Tokens of the training split, flat, uint16 or uint32."""
    validation: AnyTokens
    """Tokens of the validation split, flat; empty if nothing is kept for validation."""
    token_bytes: NDArray[np.int64]
    """[vocab]: the number of bytes of text that each token stands for."""
    fingerprint: str
    """Hash of the tokenizer and of every token: equal on two machines when they train on the same data."""
    tokenizer_path: Path | None
    """The file for `tokenizer.load_tokenizer`; None for random tokens, and for files of token ids without data.tokenizer."""
    split: str = "files"
    """How the text was split: `TextSplit.kind`, which is "none" if nothing is kept for validation; "records" if some documents of
    records are; "tail" if the last tokens of files of token ids are, "apart" if other files are."""
    documents: tuple[Documents, Documents] | None = None
    """Where documents begin in the training tokens and in those for validation; None if that is not known."""
    whole: tuple[Documented, Documented] | None = None
    """What makes sequences of whole documents of both splits; None if documents are not listed."""

    blend: tuple["Blended", ...] = ()
    """The sources of a blend; then `train` and `validation` are empty."""

    @property
    def endless(self) -> bool:
        """Whether tokens are random, so that they never run out."""
        return not self.train_tokens

    @property
    def train_tokens(self) -> int:
        """The number of tokens for training, of all sources."""
        return sum(len(part.corpus.train) for part in self.blend) or len(self.train)

    @property
    def validation_tokens(self) -> int:
        return sum(len(part.corpus.validation) for part in self.blend) or len(self.validation)

    @property
    def end_token(self) -> int | None:
        """The token that ends each document; None if documents, those of the first source of a blend, do not end by one."""
        documents = self.blend[0].corpus.documents if self.blend else self.documents
        return documents[0].end if documents and isinstance(documents[0], EndToken) else None

    @property
    def conversations(self) -> bool:
        """Whether its documents, or those of the first source of a blend, are conversations, of which answers alone are
        predicted."""
        whole = self.blend[0].corpus.whole if self.blend else self.whole
        return whole is not None and whole[0].answers is not None

    @property
    def period(self) -> Period:
        """The blend as the first period of a run."""
        sources, weights = [part.source for part in self.blend], [part.weight for part in self.blend]
        return Period(0, sources, [part.corpus.fingerprint for part in self.blend], weights)


@dataclass(frozen=True)
class Blended:
    """A source of a blend."""

    source: str
    weight: float
    corpus: Corpus


def bits_per_byte(nats: float, text_bytes: float) -> float | None:
    """Returns the bits per byte of text: the summed loss in nats over the summed `token_bytes` of the labels; None for 0 bytes."""
    return nats / math.log(2) / text_bytes if text_bytes else None


def show_data(corpus: Corpus, source: str) -> str:
    """Returns a line for people: how many tokens there are for training and for validation, or that random tokens never run out."""
    if corpus.endless:
        return f"data: {source} tokens without end"
    train, validation = corpus.train_tokens, corpus.validation_tokens
    kept = f"{validation:,} ({validation / (train + validation):.1%})" if validation else "none"
    source = f"blend of {len(corpus.blend)} sources" if corpus.blend else source
    return f"data: {source}, {train:,} tokens to train on, {kept} to validate with"

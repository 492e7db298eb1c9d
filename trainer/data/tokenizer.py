"""A byte-level BPE tokenizer: it encodes any text, and decoding gives back the same text. Token 0 marks the end of a file."""

import re
from array import array
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

END_OF_FILE = "<|endoffile|>"
END_OF_FILE_TOKEN = 0

# The words into which pre_tokenizers.ByteLevel cuts ASCII text, the most frequent first; its pattern has \p{L} for letters, \p{N}
# for digits and \s for white space.
_ASCII_WORDS = re.compile(r" ?[A-Za-z]+|[\t-\r ]+(?![^\t-\r ])|'(?:s|t|re|ve|m|ll|d)| ?[^\t-\r A-Za-z0-9]+| ?[0-9]+|[\t-\r ]+")
# The words of other text: white space and all that follows up to the next white space. \x1c to \x1f are white space for Python,
# but not for the tokenizer.
_CHUNKS = re.compile(r"[^\S\x1c-\x1f]*[\S\x1c-\x1f]+|[^\S\x1c-\x1f]+")
_CACHED_BYTES = 2**26
_AT_ONCE = 2**13
_BYTES_PER_ENTRY = 200
"""Bytes of memory that a word takes in the cache, besides its characters."""


def train_tokenizer(texts: Iterable[str], vocab: int) -> Tokenizer:
    """Returns a byte-level BPE tokenizer with at most `vocab` entries (fewer if the text has no more pairs to merge)."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab,
        special_tokens=[END_OF_FILE],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.encode_special_tokens = True
    return tokenizer


def load_tokenizer(path: Path, special_tokens: bool = False) -> Tokenizer:
    """Returns the tokenizer stored at `path`. It encodes whole texts, without padding, also if the file says otherwise.

    `special_tokens`: whether text that spells a special token becomes that token, as in prompts and conversations; else it stays
    ordinary text, so that a corpus cannot bring in tokens that control the model. The library raises Exception itself for a file
    that it cannot read."""
    tokenizer = Tokenizer.from_file(str(path))
    tokenizer.encode_special_tokens = not special_tokens  # the library means: encode what they spell
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def token_bytes(tokenizer: Tokenizer) -> NDArray[np.int64]:
    """Returns the number of bytes of text that each token stands for, [vocab]; 0 for the end-of-file token."""
    sizes = np.zeros(tokenizer.get_vocab_size(), dtype=np.int64)
    for token, index in tokenizer.get_vocab().items():
        sizes[index] = 0 if index == END_OF_FILE_TOKEN else len(token)  # the byte alphabet: one character, one byte
    return sizes


class Encoder:
    """Encodes texts to the same tokens as `tokenizer.encode`, several times as fast.

    BPE never merges across words, and words repeat. So each distinct word is encoded once and then looked up. In text that is not
    ASCII, all characters between two white spaces count as a word.
    """

    def __init__(self, tokenizer: Tokenizer, dtype: str) -> None:
        """`dtype`: the dtype of the tokens, uint16 or uint32."""
        self._tokenizer, self._typecode = tokenizer, np.dtype(dtype).char
        self._tokens: dict[str, bytes] = {}
        self._held_bytes = 0

    def encode(self, text: str) -> bytes:
        """Returns the tokens of `text` as the bytes of an array of `dtype`, without an end-of-file token."""
        words = (_ASCII_WORDS if text.isascii() else _CHUNKS).findall(text)
        self._learn(set(words))
        return b"".join(map(self._tokens.__getitem__, words))

    def _learn(self, words: set[str]) -> None:
        """Makes sure that the tokens of all `words` are in the cache. Clears the cache first if it takes more than
        _CACHED_BYTES."""
        if self._held_bytes > _CACHED_BYTES:
            self._tokens.clear()
            self._held_bytes = 0
        new = list(words.difference(self._tokens))
        for start in range(0, len(new), _AT_ONCE):
            portion = new[start : start + _AT_ONCE]
            encodings = self._tokenizer.encode_batch_fast(portion, add_special_tokens=False)
            for word, encoding in zip(portion, encodings, strict=True):
                self._tokens[word] = array(self._typecode, encoding.ids).tobytes()
                self._held_bytes += _BYTES_PER_ENTRY + len(word)

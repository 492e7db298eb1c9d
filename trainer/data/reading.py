"""Reads text in pieces, so that a file of any size takes only the memory of a piece.

Pieces end where the tokenizer would end a word anyway, so their tokens are those of the whole text.
"""

import codecs
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from bagualu.comm.errors import RecipeError
from bagualu.trainer.data.listing import TextFile, printable

PIECE_BYTES = 2**18
_LONGEST = 2**20
"""The most characters that a piece of text grows to while no word ends in it; then it is cut in the middle of a word."""
_LINE_BLOCK = 2**16
_FARTHEST = 0.25
"""How far a cut may be moved back from the requested share to a line or word end, as a fraction of the smaller part's size."""

# No word continues from a character to white space after it, nor from punctuation (except the apostrophe: 's is a word) to a
# letter or digit after it.
_WORD_END = re.compile(r".*(?:\S(?=[ \n\t\r])|[!-&(-/:-@\[-`{-~。，！？；：、](?=[A-Za-z0-9\u4e00-\u9fff]))", re.DOTALL)


@dataclass(frozen=True)
class Part:
    """The bytes of a file from `start` up to, not including, `stop`; both bounds lie between two characters."""

    file: TextFile
    start: int
    stop: int

    @property
    def size_bytes(self) -> int:
        return self.stop - self.start

    def pieces(self) -> Iterator[str]:
        """Yields the text in pieces, decoded exactly, with line ends unchanged. Raises RecipeError if the file cannot be read, is
        not UTF-8 or has changed since it was listed."""
        decoder, text = codecs.getincrementaldecoder("utf-8")(), ""
        at = self.start
        for block in _blocks(self.file, self.start, self.stop):
            try:
                text += decoder.decode(block, final=at + len(block) == self.stop)
            except UnicodeDecodeError as error:
                _require_unchanged(self.file)  # a file that is being replaced may be a mixture of two
                raise _not_utf8(self.file, at + error.start + len(block) - len(error.object)) from error
            at += len(block)
            end = _WORD_END.match(text)
            if end or len(text) >= _LONGEST:
                cut = end.end() if end else len(text)
                yield text[:cut]
                text = text[cut:]
        if text:
            yield text


def whole(file: TextFile) -> Part:
    return Part(file, 0, file.size_bytes)


def cut(file: TextFile, training_share: float, anywhere: bool) -> tuple[Part, Part]:
    """Returns the file in two parts: `training_share` of its characters, and the rest. The cut is moved back to the end of a line,
    or else to the white space before a word, if there is one nearby (_FARTHEST).

    `anywhere`: moves the cut back to the end of a line however far away that is, and not to a word. Without such a place the cut
    is not moved. Raises RecipeError.
    """
    middle = _offset_of(file, int(_characters(file) * training_share))
    near = 0 if anywhere else middle - int(_FARTHEST * min(middle, file.size_bytes - middle))
    at = _line_end(file, near, middle)
    if at is None and not anywhere:
        at = _word_start(file, near, middle)
    at = middle if at is None else at
    return Part(file, 0, at), Part(file, at, file.size_bytes)


def is_utf8(file: TextFile) -> bool:
    decoder = codecs.getincrementaldecoder("utf-8")()
    try:
        for block in _blocks(file, 0, file.size_bytes):
            decoder.decode(block)
        decoder.decode(b"", final=True)
    except UnicodeDecodeError:
        return False
    return True


def _not_utf8(file: TextFile, byte: int) -> RecipeError:
    return RecipeError(f"{printable(file.path)} is not UTF-8 text (byte {byte}); convert it or take it out of data.source")


def _blocks(file: TextFile, start: int, stop: int) -> Iterator[bytes]:
    """Yields the bytes from `start` up to `stop`, in blocks. Raises RecipeError if they cannot be read or the file has changed
    since it was listed."""
    try:
        with open(file.path, "rb", buffering=0) as stream:
            stream.seek(start)
            while start < stop and (block := stream.read(min(PIECE_BYTES, stop - start))):
                start += len(block)
                yield block
    except OSError as error:
        raise _unreadable(file, error) from error
    _require_unchanged(file)


def _require_unchanged(file: TextFile) -> None:
    try:
        status = os.stat(file.path)
    except OSError as error:
        raise _unreadable(file, error) from error
    if (status.st_size, status.st_mtime_ns) != (file.size_bytes, file.modified_nanoseconds):
        raise RecipeError(f"{printable(file.path)} has changed while it was read; start again when data.source no longer changes")


def _unreadable(file: TextFile, error: OSError) -> RecipeError:
    return RecipeError(f"{printable(file.path)} cannot be read ({error.strerror}); put it right or take it out of data.source")


def _characters(file: TextFile) -> int:
    return sum(_beginnings(block) for block in _blocks(file, 0, file.size_bytes))


def _beginnings(block: bytes) -> int:
    """Returns the number of bytes in `block` that begin a UTF-8 character."""
    return len(block) - int(np.count_nonzero(np.frombuffer(block, np.uint8) & 0xC0 == 0x80))


def _offset_of(file: TextFile, character: int) -> int:
    """Returns the byte offset in the file at which character number `character` (from 0) begins; the size of the file if it has no
    such character."""
    at = 0
    for block in _blocks(file, 0, file.size_bytes):
        count = _beginnings(block)
        if count > character:
            begin = np.flatnonzero(np.frombuffer(block, np.uint8) & 0xC0 != 0x80)
            return at + int(begin[character])
        at, character = at + len(block), character - count
    return file.size_bytes


def _line_end(file: TextFile, least: int, most: int) -> int | None:
    """Returns the last offset in least .. most that follows a line break; None if there is none."""
    stop = most
    while stop > least:
        start = max(least, stop - _LINE_BLOCK)
        newline = _read(file, start, stop).rfind(b"\n")
        if newline >= 0:
            return start + newline + 1
        stop = start
    return None


def _word_start(file: TextFile, least: int, most: int) -> int | None:
    """Returns the last offset in least .. most at which white space begins; None if there is none in the last _LINE_BLOCK bytes."""
    start = max(least, most - _LINE_BLOCK)
    offsets = [match.start() for match in re.finditer(rb"(?<![\s])[ \t\r\n]", _read(file, start, most))]
    return start + offsets[-1] if offsets and start + offsets[-1] > 0 else None


def _read(file: TextFile, start: int, stop: int) -> bytes:
    return b"".join(_blocks(file, start, stop))

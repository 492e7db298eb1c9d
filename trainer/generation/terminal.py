"""Shows texts on a terminal while they grow: one after the other, in the order of their prompts."""

from collections.abc import Sequence
from typing import TextIO


class Terminal:
    """Writes each prompt and, as it grows, the text after it; a text that ends before those in front of it waits for them."""

    def __init__(self, prompts: Sequence[str], stream: TextIO) -> None:
        self._prompts, self._stream = prompts, stream
        self._current, self._written = 0, -1
        """The text that is being written, and how many of its characters are; -1: not even its prompt."""

    def show(self, texts: Sequence[str], ended: Sequence[bool]) -> None:
        """Writes what is new in `texts`; `ended` says which of them will not grow any more."""
        while self._current < len(texts):
            if self._written < 0:
                self._begin()
            text = texts[self._current]
            self._stream.write(text[self._written :])
            self._written = len(text)
            if not ended[self._current]:
                break
            self._stream.write("\n")
            self._current, self._written = self._current + 1, -1
        self._stream.flush()

    def close(self) -> None:
        """Ends the line of a text that has not ended."""
        if self._written >= 0:
            self._stream.write("\n")
            self._stream.flush()

    def _begin(self) -> None:
        if len(self._prompts) > 1:
            self._stream.write(("\n" if self._current else "") + f"── {self._current + 1} of {len(self._prompts)}\n")
        self._stream.write(self._prompts[self._current])
        self._written = 0

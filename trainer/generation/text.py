"""Turns the tokens of a text into characters while the text grows, and finds where it ends."""

from collections.abc import Sequence

from tokenizers import Tokenizer

_INCOMPLETE = "\N{REPLACEMENT CHARACTER}"
"""What a tokenizer decodes bytes to that are no character, perhaps because the rest of the character has yet to come."""


class GrowingText:
    """The text after a prompt. `ended` says why no more tokens are wanted: end (the token that ends a document) | stop (a stop
    text) | length; None as long as they are."""

    def __init__(
        self, tokenizer: Tokenizer | None, prompt: Sequence[int], most: int, stop: Sequence[str] = (), end_token: int | None = None
    ) -> None:
        """`most`: the number of tokens after which it ends. `end_token`: the token that ends it; None: no token does. Without a
        tokenizer there are only tokens."""
        self.tokens: list[int] = []
        """All tokens after the prompt, with the one that ended the text."""
        self.ended: str | None = None
        self._tokenizer, self._prompt, self._most, self._stop, self._end = tokenizer, list(prompt), most, stop, end_token
        self._before = self._decode([])
        self._text = ""

    def add(self, token: int) -> None:
        self.tokens.append(token)
        if token == self._end:
            self.ended = "end"
        elif len(self.tokens) == self._most:
            self.ended = "length"
        if self._tokenizer is None:
            return
        whole = self._decode(self.tokens)
        self._text = whole[_common(whole, self._before) :]
        found = [at for at in map(self._text.find, self._stop) if at >= 0]
        if found:
            self._text, self.ended = self._text[: min(found)], "stop"

    @property
    def text(self) -> str | None:
        """The text so far, without a stop text; None without a tokenizer."""
        return None if self._tokenizer is None else self._text

    @property
    def settled(self) -> str:
        """The beginning of the text that more tokens cannot change: without an incomplete character at the end, and without what
        may be the beginning of a stop text. The whole text once it has ended. Without a tokenizer, the tokens as numbers."""
        if self._tokenizer is None:
            return "".join(f" {token}" for token in self.tokens)
        if self.ended:
            return self._text
        text = self._text.rstrip(_INCOMPLETE)
        longest = max((size for stop in self._stop for size in range(1, len(stop)) if text.endswith(stop[:size])), default=0)
        return text[: len(text) - longest]

    def _decode(self, tokens: Sequence[int]) -> str:
        """Returns the text of the prompt and `tokens`: a tokenizer may decode tokens in another way without those before them."""
        if self._tokenizer is None:
            return ""
        return str(self._tokenizer.decode([*self._prompt, *tokens], skip_special_tokens=True))


def _common(first: str, second: str) -> int:
    """Returns the length of the longest common beginning."""
    if first.startswith(second):
        return len(second)
    return next((at for at, letters in enumerate(zip(first, second, strict=False)) if letters[0] != letters[1]), len(first))

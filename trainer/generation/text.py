"""Turns the tokens of a text into characters while the text grows, and finds where it ends."""

from collections.abc import Collection, Sequence

from tokenizers import Tokenizer

_INCOMPLETE = "\N{REPLACEMENT CHARACTER}"
"""What a tokenizer decodes bytes to that are no character, perhaps because the rest of the character has yet to come."""


class GrowingText:
    """The text after a prompt, without special tokens. `ended` says why no more tokens are wanted: end (a token that ends a
    document) | stop (a stop text) | length; None as long as they are."""

    def __init__(
        self,
        tokenizer: Tokenizer | None,
        prompt: Sequence[int],
        most: int,
        stop: Sequence[str] = (),
        end_tokens: Collection[int] = (),
    ) -> None:
        """`most`: the number of tokens after which it ends. `stop`: texts that end it, which may spell special tokens.
        `end_tokens`: tokens that end it. Without a tokenizer there are only tokens."""
        self.tokens: list[int] = []
        """All tokens after the prompt, with the one that ended the text."""
        self.ended: str | None = None
        self._tokenizer, self._prompt, self._most, self._ends = tokenizer, list(prompt), most, frozenset(end_tokens)
        special = _special_tokens(tokenizer) if tokenizer is not None and stop else ()
        self._special = [token for token in special if any(token in text for text in stop)]
        """The special tokens that stop texts spell."""
        self._stop = [text for text in stop if not any(token in text for token in self._special)]
        self._spelt = [text for text in stop if text not in self._stop]
        """The stop texts without and with special tokens."""
        self._before, self._before_spelt = self._decode([]), self._decode([], True)
        self._text, self._raw = "", ""
        """The text, and if a stop text spells special tokens, the same with special tokens as they are spelt."""

    def add(self, token: int) -> None:
        self.tokens.append(token)
        if token in self._ends:
            self.ended = "end"
        elif len(self.tokens) == self._most:
            self.ended = "length"
        if self._tokenizer is None:
            return
        self._text = _after(self._before, self._decode(self.tokens))
        self._raw = _after(self._before_spelt, self._decode(self.tokens, True)) if self._spelt else ""
        found = [at for at in map(self._text.find, self._stop) if at >= 0]
        if found:
            self._text, self.ended = self._text[: min(found)], "stop"
        elif spelt := [at for at in map(self._raw.find, self._spelt) if at >= 0]:
            rest = self._without_special(self._raw[min(spelt) :])
            self._text, self.ended = self._text[: len(self._text) - len(rest)], "stop"

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
        held = max((_beginning(text, stop) for stop in self._stop), key=len, default="")
        spelt = max((_beginning(self._raw, stop) for stop in self._spelt), key=len, default="")
        return text[: len(text) - max(len(held), len(self._without_special(spelt)))]

    def _without_special(self, spelt: str) -> str:
        """Returns a part of a stop text without the special tokens that it spells."""
        for token in self._special:
            spelt = spelt.replace(token, "")
        return spelt

    def _decode(self, tokens: Sequence[int], special: bool = False) -> str:
        """Returns the text of the prompt and `tokens`, with `special` tokens as they are spelt: a tokenizer may decode tokens in
        another way without those before them."""
        if self._tokenizer is None:
            return ""
        return str(self._tokenizer.decode([*self._prompt, *tokens], skip_special_tokens=not special))


def _beginning(text: str, stop: str) -> str:
    """Returns the longest beginning of `stop` with which `text` ends."""
    return next((stop[:size] for size in range(len(stop) - 1, 0, -1) if text.endswith(stop[:size])), "")


def _special_tokens(tokenizer: Tokenizer) -> list[str]:
    return [token.content for token in tokenizer.get_added_tokens_decoder().values() if token.special]


def _after(before: str, whole: str) -> str:
    """Returns what follows `before` in `whole`, or from where the two differ."""
    if whole.startswith(before):
        return whole[len(before) :]
    common = next((at for at, letters in enumerate(zip(whole, before, strict=False)) if letters[0] != letters[1]), len(whole))
    return whole[common:]

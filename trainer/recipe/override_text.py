"""Prepares the text of an override for Hydra's grammar, which reads 2024_01 as a number and rejects letters outside ASCII.

The values of text keys are put into quotes, so that they stay as typed. Lists, dictionaries, several values and Hydra's functions
keep their meaning: `[` or `{` at the start of a value opens a list or a dictionary, a comma ends a value, and quotes around a value
hold it together. A value is refused if a quote opens inside it and closes only after a comma, because it is unclear whether the
comma ends the value. This module does not import Hydra.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from typing import Any


class ValueKind(Enum):
    """How the values of a key are read."""

    TEXT = "text"
    OPTIONAL_TEXT = "text or null"
    OTHER = "numbers, true or false, and values that may be one or the other"


KindOf = Callable[[str], ValueKind]
"""Maps a key, e.g. "run.name", to the kind of its values, or of its items if it takes a list."""

_CALL = re.compile(r"(int|float|str|bool|json_str|choice|range|interval|glob|sort|shuffle|tag)\s*\(")
_HOLDS_VALUES = ("choice", "sort", "shuffle", "str")
"""Hydra's functions whose arguments are values of the key, as in choice(a, b)."""
_NAMED = re.compile(r"[A-Za-z_]\w*=")
_QUOTED = re.compile(r"""("(?:\\.|[^"\\])*"|'(?:\\.|[^'\\])*')""", re.DOTALL)
_OPENING_QUOTE = re.compile(r"""(?<=[\s=(])["']""")
"""A quote at the start of a word, unlike the apostrophe in it's."""
_ESCAPED = re.compile(r"\\([\\()\[\]{}:=, \t])")
_READABLE = re.compile(r"[A-Za-z0-9_+.\-/\\$%*@?|: \t]*")
"""Text that Hydra's grammar accepts without quotes."""
_SAFE = re.compile(r"[\w./=@:+%-]+")
"""Text that Hydra reads as the same text with quotes and without."""
_KEY = re.compile(r"\s*([^\s:,{}\[\]\"']+)\s*:")
_OPENING = {"]": "[", "}": "{", ")": "("}


def quoted(text: str) -> str:
    """Returns a value in Hydra's grammar that is read back as exactly `text`; interpolations in it are not evaluated."""
    return _in_quotes(escaped(text))


def typed(value: Any) -> str:
    """Returns a plain value as text that the user may type in an override, so that it is read back as the same value. Text gets
    quotes only if it needs them."""
    if isinstance(value, str):
        return value if _SAFE.fullmatch(value) and value.lower() != "null" else quoted(value)
    if isinstance(value, list):
        return "[" + ",".join(map(typed, value)) + "]"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key}: {typed(inner)}" for key, inner in value.items()) + "}"
    return "null" if value is None else str(value).lower()


def _in_quotes(text: str) -> str:
    """Returns `text` in quotes. In Hydra's grammar a backslash is an escape only directly before a quote."""
    return '"' + re.sub(r'(\\*)("|\Z)', lambda match: match[1] * 2 + ('\\"' if match[2] else ""), text) + '"'


def escaped(text: str) -> str:
    """Returns `text` escaped so that OmegaConf reads it as exactly `text`, with no interpolation of ${...}."""
    if "${" not in text:
        return text
    doubled = re.sub(r"(\\*)\$\{", lambda match: match[1] * 2 + r"\${", text)
    return re.sub(r"(\\+)\Z", lambda match: match[1] * 2, doubled)


def spelled(override: str, kind_of: KindOf) -> str:
    """Returns `override` (KEY=VALUE) with its text values in quotes; without "=" it is returned unchanged. Raises ValueError if a
    value has no end or is followed by other text."""
    key, equals, value = override.partition("=")
    if not equals:
        return override
    reader = _Reader(value, kind_of)
    return key + equals + reader.values(key.lstrip("+"), "")


@dataclass
class _Reader:
    """Reads the text after the "=" of an override once, from left to right, and returns it with text values in quotes."""

    text: str
    kind_of: KindOf
    at: int = 0

    def values(self, key: str, closing: str) -> str:
        """Reads the values between commas up to and including `closing`, or to the end of the text if `closing` is empty. Returns
        them as text, joined by commas and followed by `closing`."""
        parts: list[str] = []
        while not self._at(closing):
            parts.append(self._value(key, closing))
            self._go_on_after_value(closing)
        if self.text[: self.at].rstrip(" \t").endswith(","):
            raise ValueError(f"{self.text[: self.at]} ends in a comma")
        self.at += 1
        return ",".join(parts) + closing

    def _at(self, closing: str) -> bool:
        """Returns whether, after white space, `closing` follows, or the end of the text if `closing` is empty."""
        self._skip_space()
        return self.text[self.at : self.at + 1] == closing

    def _go_on_after_value(self, closing: str) -> None:
        """Moves to the next value, or to `closing`. Raises ValueError if neither follows."""
        self._skip_space()
        following = self.text[self.at : self.at + 1]
        if following == ",":
            self.at += 1
        elif following != closing:
            raise ValueError(f"{self.text[: self.at]} does not end here")

    def _skip_space(self) -> None:
        while self.text[self.at : self.at + 1] in (" ", "\t"):
            self.at += 1

    def _value(self, key: str, closing: str) -> str:
        self._skip_space()
        rest = self.text[self.at : self.at + 1]
        if rest and rest in "\"'":
            return self._quoted()
        if rest == "[":
            self.at += 1
            return "[" + self.values(key, "]")
        if rest == "{":
            self.at += 1
            return "{" + self._entries(key)
        if (call := _CALL.match(self.text, self.at)) and self._closes(call.end()):
            return self._call(key, call)
        return self._plain(key, closing)

    def _quoted(self) -> str:
        match = _QUOTED.match(self.text, self.at)
        if match is None:
            raise ValueError(f"{self.text[self.at :]} has no closing quote")
        self.at = match.end()
        return match[1]

    def _entries(self, key: str) -> str:
        """Reads the entries of a dictionary up to and including the closing brace; returns them as text."""
        entries: list[str] = []
        self._skip_space()
        while self.text[self.at : self.at + 1] != "}":
            match = _KEY.match(self.text, self.at)
            if match is None:
                raise ValueError(f"{self.text[self.at :]} is no entry of a dictionary")
            self.at = match.end()
            entries.append(f"{match[1]}: " + self._value(f"{key}.{match[1]}", "}"))
            self._go_on_after_value("}")
            self._skip_space()
        self.at += 1
        return ", ".join(entries) + "}"

    def _closes(self, at: int) -> bool:
        """Returns whether the parenthesis that opens just before `at` is closed, and the value ends where it closes."""
        depth = 1
        while at < len(self.text) and depth:
            if match := _QUOTED.match(self.text, at):
                at = match.end()
                continue
            depth += {"(": 1, ")": -1}.get(self.text[at], 0)
            at += 1
        return not depth and re.match(r"\s*($|[,\])}])", self.text[at:]) is not None

    def _call(self, key: str, call: re.Match[str]) -> str:
        """Reads a call of one of Hydra's functions; arguments that are values of the key are read as such."""
        self.at = call.end()
        inside = key if call[1] in _HOLDS_VALUES else ""
        arguments: list[str] = []
        while True:
            self._skip_space()
            if self.text[self.at : self.at + 1] == ")":
                break
            name = _NAMED.match(self.text, self.at)
            if name:
                self.at = name.end()
            argument = self._value("" if name and name[0] not in ("list=", "sweep=") else inside, ")")
            arguments.append((name[0] if name else "") + argument)
            self._go_on_after_value(")")
        self.at += 1
        return f"{call[1]}({','.join(arguments)})"

    def _plain(self, key: str, closing: str) -> str:
        """Reads a value without quotes, up to a comma or to the end of the list that it is in. Pairs of brackets inside it belong
        to it."""
        start, depth = self.at, 0
        while self.at < len(self.text) and (depth or self.text[self.at] not in ("," + closing)):
            if self.text.startswith("${", self.at):
                self._skip_interpolation()
                continue
            if closing:
                depth += {_OPENING[closing]: 1, closing: -1}.get(self.text[self.at], 0)
            self.at += 2 if _ESCAPED.match(self.text, self.at) else 1
        typed = self.text[start : self.at].rstrip(" \t")
        rest = self.text[self.at :]
        if rest.startswith(",") and any(quote in rest for quote in _OPENING_QUOTE.findall(_QUOTED.sub("", typed))):
            raise ValueError(f"{typed} opens a quote that closes only after the comma")
        kind = self.kind_of(key) if key else ValueKind.OTHER
        if not typed or (kind is ValueKind.OPTIONAL_TEXT and typed.lower() == "null"):
            return typed
        if kind is ValueKind.OTHER and ("${" in typed or _READABLE.fullmatch(typed)):
            return typed
        return _in_quotes(_ESCAPED.sub(r"\1", typed))

    def _skip_interpolation(self) -> None:
        depth = 0
        while self.at < len(self.text):
            depth += {"{": 1, "}": -1}.get(self.text[self.at], 0)
            self.at += 1
            if self.text[self.at - 1] == "}" and not depth:
                return

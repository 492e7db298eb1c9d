"""Conversations as text, by the chat template of a tokenizer, and which of its characters are answers.

Templates are those of Hugging Face (Jinja), in the file chat_template.jinja or in tokenizer_config.json beside tokenizer.json.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jinja2
import jinja2.sandbox

from bagualu.comm.errors import RecipeError

BESIDE_TOKENIZERS = _FILE, _CONFIG = "chat_template.jinja", "tokenizer_config.json"
"""Files beside a tokenizer.json: a chat template; special tokens, and a chat template if that is not in a file of its own."""
_ANSWERS = "assistant"
"""The role whose messages are trained on."""
_SPECIAL = ("bos_token", "eos_token", "pad_token", "unk_token")


class ChatTemplate:
    """The chat template beside the tokenizer `path`."""

    def __init__(self, path: Path) -> None:
        """Raises RecipeError if there is none, or it is no template."""
        self.path = path
        config = _config(path.parent / _CONFIG)
        self._special = {name: _content(config.get(name)) for name in _SPECIAL}
        environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
        )
        environment.filters["tojson"] = _to_json
        environment.globals["raise_exception"] = _raise
        try:
            self._template = environment.from_string(_source(path.parent, config))
        except jinja2.TemplateError as error:
            raise RecipeError(f"the chat template of data.tokenizer={path} cannot be read ({error}); correct it") from error

    def render(self, messages: Sequence[dict[str, Any]], asks: bool = False) -> str:
        """Returns the text of a conversation; with `asks`, up to where the next answer begins. Raises jinja2.TemplateError."""
        return self._template.render(messages=list(messages), add_generation_prompt=asks, **self._special)

    def conversation(self, messages: Any, where: str) -> tuple[str, list[tuple[int, int]]]:
        """Returns the text of a conversation, and for each answer its first character and the character after it: what the model
        says, with the mark of its end. `where` says to people where it comes from. Raises RecipeError for what is no
        conversation."""
        _require_messages(messages, where)
        try:
            text = self.render(messages)
            spans = []
            for number, message in enumerate(messages):
                if message["role"] == _ANSWERS:
                    before, after = self.render(messages[:number], asks=True), self.render(messages[: number + 1])
                    if not (after.startswith(before) and text.startswith(after)):
                        raise RecipeError(f"{where}: the chat template changes what comes before message {number + 1} when more "
                                          "follows, so its answers cannot be told apart; give a template that does not, or one "
                                          "answer per conversation")  # fmt: skip
                    spans.append((len(before), len(after)))
        except jinja2.TemplateError as error:
            raise RecipeError(f"{where}: the chat template refuses the conversation ({error}); correct or remove it") from error
        return text, spans


def _require_messages(messages: Any, where: str) -> None:
    fine = isinstance(messages, list) and messages and all(isinstance(message, dict) for message in messages)
    if not fine or not all(isinstance(message.get("role"), str) and "content" in message for message in messages):
        raise RecipeError(f"{where} is no conversation; give a list like [{{role: user, content: ...}}, {{role: {_ANSWERS}, "
                          "content: ...}], in the field that data.field names")  # fmt: skip
    if not any(message["role"] == _ANSWERS for message in messages):
        raise RecipeError(f"{where} has no message of the role {_ANSWERS}, so there is nothing to learn from it; remove it")


def _config(path: Path) -> dict[str, Any]:
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return config if isinstance(config, dict) else {}


def _content(token: Any) -> str:
    """Returns the text of a special token, which is text or an object."""
    text = token.get("content") if isinstance(token, dict) else token
    return text if isinstance(text, str) else ""


def _source(folder: Path, config: dict[str, Any]) -> str:
    if (folder / _FILE).is_file():
        return (folder / _FILE).read_text(encoding="utf-8")
    template = config.get("chat_template")
    if isinstance(template, list):  # several, by name
        named = {entry.get("name"): entry.get("template") for entry in template if isinstance(entry, dict)}
        template = named.get("default")
    if not isinstance(template, str):
        raise RecipeError(f"data.format=chat needs a chat template, and {folder} has none in {_FILE} or {_CONFIG}; put one there")
    return template


def _raise(message: str) -> None:
    raise jinja2.TemplateError(message)


def _to_json(value: Any, indent: int | None = None) -> str:
    return json.dumps(value, ensure_ascii=False, indent=indent)

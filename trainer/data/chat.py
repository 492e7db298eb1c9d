"""Conversations as text, by the chat template of a tokenizer, and which of its characters are answers.

Templates are those of Hugging Face (Jinja), in the file chat_template.jinja or in tokenizer_config.json beside tokenizer.json. They
see what transformers shows them: the messages, no tools and no documents, the special tokens, and the statement
`{% generation %}`, which marks the answers. They do not see the date (`strftime_now`), by which a corpus would be another one
tomorrow; templates that write it have one of their own in its place.
"""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jinja2
import jinja2.sandbox
from jinja2 import nodes
from jinja2.ext import Extension
from jinja2.parser import Parser

from bagualu.comm.errors import RecipeError
from bagualu.fault_tolerance.run_directory import CHAT_TEMPLATE, GENERATION, TOKENIZER_CONFIG
from bagualu.trainer.data.tokenizer_files import fields_of, special_token

BESIDE_TOKENIZERS = CHAT_TEMPLATE, TOKENIZER_CONFIG, GENERATION
"""Files beside a tokenizer.json: a chat template; special tokens, and a chat template if that is not in a file of its own; tokens
that end a text."""
_ANSWERS = "assistant"
"""The role whose messages are trained on."""
_SPECIAL = ("bos_token", "eos_token", "pad_token", "unk_token")
Spans = list[tuple[int, int]]
"""The first character of each part of a text, and the character after it."""


class _Generation(Extension):
    """The statement `{% generation %}...{% endgeneration %}`, with which a template marks what the model says."""

    tags = {"generation"}  # noqa: RUF012  jinja2 declares it so

    def __init__(self, environment: jinja2.Environment) -> None:
        super().__init__(environment)
        self.used = False
        """Whether the template has the statement."""
        self.written: list[str] = []
        """The parts of the text that have been rendered so far."""
        self.spans: Spans = []

    def parse(self, parser: Parser) -> nodes.Node:
        self.used = True
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_mark"), [], [], body).set_lineno(line)

    def _mark(self, caller: Callable[[], str]) -> str:
        text, first = caller(), sum(map(len, self.written))
        self.spans.append((first, first + len(text)))
        return text


class ChatTemplate:
    """The chat template beside the tokenizer `path`."""

    def __init__(self, path: Path) -> None:
        """Raises RecipeError if there is none, or it is no template."""
        self.path = path
        special = {name: token for name in _SPECIAL if (token := special_token(path, name))}
        self._always = {"tools": None, "documents": None, **special}
        environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, "jinja2.ext.loopcontrols"]
        )
        environment.filters["tojson"] = _to_json
        environment.globals["raise_exception"] = _raise
        marks = environment.extensions[_Generation.identifier]
        assert isinstance(marks, _Generation)
        self._marks = marks
        try:
            self._template = environment.from_string(_source(path.parent))
        except jinja2.TemplateError as error:
            raise RecipeError(f"the chat template of data.tokenizer={path} cannot be read ({error}); correct it") from error

    def render(self, messages: Sequence[dict[str, Any]], asks: bool = False) -> str:
        """Returns the text of a conversation; with `asks`, up to where the next answer begins. Raises jinja2.TemplateError."""
        written: list[str] = []
        self._marks.written, self._marks.spans = written, []
        given = [{key: value for key, value in message.items() if value is not None} for message in messages]
        for part in self._template.generate(messages=given, add_generation_prompt=asks, **self._always):
            written.append(part)
        return "".join(written)

    def conversation(self, messages: Any, where: str) -> tuple[str, Spans]:
        """Returns the text of a conversation, and for each answer its first character and the character after it: what the template
        marks by `{% generation %}`, else what the model says, with the mark of its end. `where` says to people where it comes
        from. Raises RecipeError for what is no conversation."""
        _require_messages(messages, where)
        try:
            text = self.render(messages)
            return text, self._marked(where) if self._marks.used else self._found(messages, text, where)
        except jinja2.TemplateError as error:
            raise RecipeError(f"{where}: the chat template refuses the conversation ({error}); correct or remove it") from error

    def _marked(self, where: str) -> Spans:
        """Returns what the template has marked in the text that it rendered last. Raises RecipeError for nothing."""
        spans = [(first, after) for first, after in self._marks.spans if first < after]
        if not spans:
            raise RecipeError(f"{where}: the chat template has {{% generation %}} and marks no answer of the conversation by it; "
                              "mark what the model says")  # fmt: skip
        return spans

    def _found(self, messages: Sequence[dict[str, Any]], text: str, where: str) -> Spans:
        """Returns the answers in the `text` of a conversation: what the template adds for each to the conversation before it.
        Raises RecipeError for a template that writes an answer differently when more follows: then a model that answers sees
        another conversation than it is trained on."""
        spans = []
        for number, message in enumerate(messages):
            if message["role"] == _ANSWERS:
                before, after = self.render(messages[:number], asks=True), self.render(messages[: number + 1])
                if not (after.startswith(before) and text.startswith(after)):
                    raise RecipeError(f"{where}: the chat template changes what comes before message {number + 1}, or that "
                                      "message, when more follows, as those do that drop earlier thinking, so its answers cannot "
                                      "be told apart; give one answer per conversation, or a template that does not or that marks "
                                      "answers by {% generation %}")  # fmt: skip
                spans.append((len(before), len(after)))
        return spans


def _require_messages(messages: Any, where: str) -> None:
    fine = isinstance(messages, list) and messages and all(isinstance(message, dict) for message in messages)
    if not fine or not all(isinstance(message.get("role"), str) and "content" in message for message in messages):
        raise RecipeError(f"{where} is no conversation; give a list like [{{role: user, content: ...}}, {{role: {_ANSWERS}, "
                          "content: ...}], in the field that data.field names")  # fmt: skip
    if not any(message["role"] == _ANSWERS for message in messages):
        raise RecipeError(f"{where} has no message of the role {_ANSWERS}, so there is nothing to learn from it; remove it")


def _source(folder: Path) -> str:
    if (folder / CHAT_TEMPLATE).is_file():
        return (folder / CHAT_TEMPLATE).read_text(encoding="utf-8")
    template = fields_of(folder / TOKENIZER_CONFIG).get("chat_template")
    if isinstance(template, list):  # several, by name
        named = {entry.get("name"): entry.get("template") for entry in template if isinstance(entry, dict)}
        template = named.get("default")
    if not isinstance(template, str):
        raise RecipeError(f"data.format=chat needs a chat template, and {folder} has none in {CHAT_TEMPLATE} or "
                          f"{TOKENIZER_CONFIG}; put one there")  # fmt: skip
    return template


def _raise(message: str) -> None:
    raise jinja2.TemplateError(message)


def _to_json(
    value: Any, ensure_ascii: bool = False, indent: int | None = None, separators: Any = None, sort_keys: bool = False
) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

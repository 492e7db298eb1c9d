"""Conversations: the template writes them, only answers are trained on, and none is cut in two while it fits into a sequence."""

import json
from collections import Counter
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer

from bagualu.comm.errors import RecipeError
from bagualu.trainer.data.batches import Batches
from bagualu.trainer.data.chat import ChatTemplate
from bagualu.trainer.data.config import DataConfig
from bagualu.trainer.data.corpus import check_source, prepare
from bagualu.trainer.data.whole import Documented, pack
from tests.trainer.data.conftest import words

TEMPLATE = (
    "{% for message in messages %}<|{{ message.role }}|>{{ message.content }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
SPECIAL = ["<|user|>", "<|assistant|>", "<|system|>", "<|end|>"]
S = 64
MARKED = (
    "{% for message in messages %}<|{{ message.role }}|>{% if message.role == 'assistant' %}"
    "{% generation %}{{ message.content }}<|end|>{% endgeneration %}{% else %}{{ message.content }}<|end|>{% endif %}\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
"""Writes what TEMPLATE writes, and marks answers."""
QWEN3 = (
    "{%- set last = namespace(question=-1) %}"
    "{%- for message in messages %}{%- if message.role == 'user' %}{%- set last.question = loop.index0 %}{%- endif %}{%- endfor %}"
    "{%- for message in messages %}{%- set content = message.content %}"
    "{%- if message.role == 'assistant' %}{%- set thought = message.reasoning_content or '' %}"
    "{%- if '</think>' in content %}{%- set thought = content.split('</think>')[0].split('<think>')[-1].strip('\\n') %}"
    "{%- set content = content.split('</think>')[-1].lstrip('\\n') %}{%- endif %}"
    "{%- if loop.index0 > last.question and (loop.last or thought) %}"
    "{{- '<|assistant|>\\n<think>\\n' + thought + '\\n</think>\\n\\n' + content + '<|end|>\\n' }}"
    "{%- else %}{{- '<|assistant|>\\n' + content + '<|end|>\\n' }}{%- endif %}"
    "{%- else %}{{- '<|' + message.role + '|>\\n' + content + '<|end|>\\n' }}{%- endif %}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|assistant|>\\n' }}{%- endif %}"
)
"""Drops the thinking before the latest question, and gives an answer without thinking an empty thought, as that of Qwen3 does."""


def make(folder: Path, template: str = TEMPLATE, in_a_file: bool = False) -> Path:
    """A tokenizer with a chat template; every other token is a byte or a merge of bytes."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=280, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator([words(300, 1)], trainer)
    made = folder / "made"
    made.mkdir(exist_ok=True)
    tokenizer.save(str(made / "tokenizer.json"))
    (made / "tokenizer_config.json").write_text(
        json.dumps({"eos_token": "<|end|>", **({} if in_a_file else {"chat_template": template})})
    )
    if in_a_file:
        (made / "chat_template.jinja").write_text(template)
    return made


def conversation(number: int, turns: int = 1) -> list[dict[str, str]]:
    messages = [{"role": "system", "content": f"rules {number}"}] if number % 3 == 0 else []
    for turn in range(turns):
        messages += [{"role": "user", "content": words(2, 10 * number + turn)},
                     {"role": "assistant", "content": words(1 + number % 3, 7 * number + turn)}]  # fmt: skip
    return messages


def write(folder: Path, conversations: list[Any], field: str = "messages") -> Path:
    path = folder / "chats.jsonl"
    path.write_text("".join(json.dumps({field: messages}) + "\n" for messages in conversations))
    return path


def config(source: Path, made: Path, **changes: Any) -> DataConfig:
    fixed = {"source": str(source), "cache": str(source.parent / "cache"), "tokenizer": str(made), "format": "chat"}
    fixed |= {"packing": "whole", "sequence_length": S, "global_batch": 4, "validation_fraction": 0.2}
    return DataConfig(**{**fixed, **changes})


@pytest.mark.parametrize("in_a_file", [False, True])
def test_answers_are_what_the_model_says_and_the_end_of_it(tmp_path: Path, in_a_file: bool) -> None:
    template = ChatTemplate(make(tmp_path, in_a_file=in_a_file) / "tokenizer.json")
    messages = [{"role": "user", "content": "a?"}, {"role": "assistant", "content": "b"},
                {"role": "user", "content": "c?"}, {"role": "assistant", "content": "d"}]  # fmt: skip
    text, spans = template.conversation(messages, "here")
    assert text == "<|user|>a?<|end|>\n<|assistant|>b<|end|>\n<|user|>c?<|end|>\n<|assistant|>d<|end|>\n"
    assert [text[first:after] for first, after in spans] == ["b<|end|>\n", "d<|end|>\n"]


def test_answers_are_what_the_template_marks(tmp_path: Path) -> None:
    """They are the same characters that transformers finds, also if the template writes other text around them."""
    path = make(tmp_path, MARKED)
    template, tokenizer = ChatTemplate(path / "tokenizer.json"), AutoTokenizer.from_pretrained(path)
    for messages in (conversation(3, turns=3), conversation(1)):
        text, spans = template.conversation(messages, "here")
        assert [text[first:after] for first, after in spans] == [
            f"{message['content']}<|end|>" for message in messages if message["role"] == "assistant"
        ]
        theirs = tokenizer.apply_chat_template(messages, return_assistant_tokens_mask=True, return_dict=True)
        encoding = Tokenizer.from_file(str(path / "tokenizer.json")).encode(text)
        assert theirs["input_ids"] == encoding.ids
        inside = [int(any(first < after and begin < end and first < end and begin < after for begin, end in spans))
                  for first, after in encoding.offsets]  # fmt: skip
        assert theirs["assistant_masks"] == inside


def test_a_template_that_marks_answers_may_write_earlier_ones_otherwise(tmp_path: Path) -> None:
    """Then there is no doubt which tokens are to be learned."""
    changing = MARKED.replace("message.content }}<|end|>{% endgen", "message.content if loop.last else '...' }}<|end|>{% endgen")
    text, spans = ChatTemplate(make(tmp_path, changing) / "tokenizer.json").conversation(conversation(1, turns=2), "here")
    assert [text[first:after] for first, after in spans[:1]] == ["...<|end|>"]
    assert len(spans) == 2


def test_a_template_that_drops_earlier_thinking_is_for_one_answer(tmp_path: Path) -> None:
    template = ChatTemplate(make(tmp_path, QWEN3) / "tokenizer.json")
    question, answer = {"role": "user", "content": "a?"}, {"role": "assistant", "content": "<think>\nhm\n</think>\n\nb"}
    for one, wanted in (
        ({**answer, "content": "b"}, "<think>\n\n</think>\n\nb<|end|>\n"),
        (answer, "<think>\nhm\n</think>\n\nb<|end|>\n"),
    ):
        text, spans = template.conversation([question, one], "here")
        assert [text[first:after] for first, after in spans] == [wanted]
        with pytest.raises(
            RecipeError, match=r"here: the chat template changes .* as those do that drop earlier thinking, .* give one ans"
        ) as error:
            template.conversation([question, one, question, answer], "here")
        assert "\n" not in str(error.value)


def test_templates_see_what_transformers_shows_them(tmp_path: Path) -> None:
    template = (
        "{% if tools is none and documents is none %}none{% endif %}"
        "{% if bos_token is defined %}begins{% endif %}{{ {'b': 'ü', 'a': 1} | tojson(sort_keys=True, separators=(',', ':')) }}"
        "{% for message in messages %}{{ 'calls' if message.tool_calls is defined }}{% endfor %}" + TEMPLATE
    )
    path = make(tmp_path, template)
    messages = [{"role": "user", "content": "a?"}, {"role": "assistant", "content": "b", "tool_calls": None}]
    text, _ = ChatTemplate(path / "tokenizer.json").conversation(messages, "here")
    assert text == AutoTokenizer.from_pretrained(path).apply_chat_template(messages, tokenize=False)
    assert text.startswith('none{"a":1,"b":"ü"}<|user|>')


def test_a_conversation_is_the_same_tomorrow(tmp_path: Path) -> None:
    template = "{{ strftime_now('%Y-%m-%d') if strftime_now is defined else 'some day' }}" + TEMPLATE
    messages = [{"role": "user", "content": "a?"}, {"role": "assistant", "content": "b"}]
    text, _ = ChatTemplate(make(tmp_path, template) / "tokenizer.json").conversation(messages, "here")
    assert text.startswith("some day<|user|>")


@given(st.lists(st.integers(0, 20), max_size=40), st.integers(20, 30))
@settings(deadline=None)
def test_every_document_lies_in_one_sequence_that_has_room_for_it(sizes: list[int], room: int) -> None:
    array = np.array(sizes, np.int64)
    order, begins = pack(array, room)
    assert sorted(order.tolist()) == list(range(len(sizes)))
    assert (begins[0], begins[-1]) == (0, len(sizes))
    used = [sum(max(1, sizes[document]) for document in order[a:b]) for a, b in pairwise(begins)]
    assert all(0 < total <= room for total in used)
    assert sum(total <= room / 2 for total in used) <= 1  # else two of them would be one


def test_how_documents_are_put_together_is_fixed_for_good(monkeypatch: pytest.MonkeyPatch) -> None:
    """A change here breaks the resume of every run on whole documents."""
    sizes = [5, 1, 10, 2, 7, 1, 1, 4, 2, 0, 3, 4, 1, 5, 10, 6, 4, 10, 6, 2, 11, 0, 5, 0, 0]
    expected = [[20, 1], [2, 5, 6], [14, 19], [17, 8], [4, 0], [15, 18], [13, 22, 3], [7, 11, 16], [10, 9, 12, 21, 23, 24]]
    for at_once in (1, 7, 100):
        monkeypatch.setattr("bagualu.trainer.data.whole._PACKED_AT_ONCE", at_once)
        order, begins = pack(np.array(sizes, np.int64), 12)
        assert [order[first:after].tolist() for first, after in pairwise(begins)] == expected


def rows_of(batches: Batches, steps: int) -> list[tuple[Any, Any, Any]]:
    return [row for step in range(steps) for row in zip(*(t.tolist() for t in batches.batch(step, 0, 4)), strict=True)]


def test_each_conversation_comes_once_an_epoch_whole_with_its_answers_alone_as_labels(tmp_path: Path) -> None:
    made = make(tmp_path)
    conversations = [conversation(number, turns=1 + number % 2) for number in range(60)]
    data = config(write(tmp_path, conversations), made)
    corpus = prepare(data, 300)
    batches = Batches(corpus, data, seed=1)
    tokenizer, template = Tokenizer.from_file(str(made / "tokenizer.json")), ChatTemplate(made / "tokenizer.json")
    expected: Counter[tuple[str, str]] = Counter()
    for messages in conversations:
        text, spans = template.conversation(messages, "")
        expected[text, "".join(text[first:after] for first, after in spans)] += 1
    found: Counter[tuple[str, str]] = Counter()
    rows = [*rows_of(batches, batches.train_count)]  # four epochs
    validation = [tuple(t[0].tolist() for t in batches.validation(number, 1)) for number in range(batches.validation_count)]
    for inputs, labels, begins in [*rows, *validation * 4]:
        for begin in sorted(set(begins)):
            at = [place for place in range(S) if begins[place] == begin]
            assert at == list(range(begin, begin + len(at)))
            answer = [labels[place] for place in at if labels[place] != -100]
            if not answer:
                assert len(at) == 1  # left over
                continue
            whole = [inputs[place] for place in at] + [answer[-1]]
            assert all(labels[place] in (-100, whole[place - begin + 1]) for place in at)
            text = tokenizer.decode(whole, skip_special_tokens=False)
            found[text, tokenizer.decode(answer, skip_special_tokens=False)] += 1
    assert {key: count / 4 for key, count in found.items()} == dict(expected)


def test_how_documents_are_put_together_is_computed_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = config(write(tmp_path, [conversation(number) for number in range(40)]), make(tmp_path))
    first = Batches(prepare(data, 300), data, seed=1).batch(3, 0, 4)
    monkeypatch.setattr("bagualu.trainer.data.whole.pack", None)
    for before, again in zip(first, Batches(prepare(data, 300), data, seed=1).batch(3, 0, 4), strict=True):
        assert np.array_equal(before, again)


def test_what_is_longer_than_a_sequence_is_cut_and_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    long = [{"role": "user", "content": "why?"}, {"role": "assistant", "content": words(200, 3)}]
    data = config(write(tmp_path, [long] * 3), make(tmp_path), sequence_length=40)
    corpus = prepare(data, 300, validation=False)
    assert "3 of 3 documents for training are longer than data.sequence_length=40 and lose their ends" in caplog.text
    inputs, labels, begins = Batches(corpus, data, seed=1).batch(0, 0, 4)
    assert (np.asarray(begins) == 0).all()
    assert np.array_equal(np.asarray(inputs)[:, -9:], np.asarray(labels)[:, -10:-1])


def test_conversations_that_all_lose_their_answers_are_refused(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """They would train on nothing, with a loss of 0."""
    question = {"role": "user", "content": words(50, 3)}
    long, short = [question, {"role": "assistant", "content": "yes"}], conversation(1)
    data = config(write(tmp_path, [long] * 3), make(tmp_path), sequence_length=10)
    expected = (r"none of the 3 conversations of .*chats\.jsonl for training has an answer within "
                r"data\.sequence_length=10 \(3 are cut off there\), .* give data\.sequence_length=(\d+), which")  # fmt: skip
    with pytest.raises(RecipeError, match=expected) as error:
        prepare(data, 300, validation=False)
    assert "\n" not in str(error.value)
    enough = int(str(error.value).split("give data.sequence_length=")[1].split(",")[0])
    prepare(replace(data, sequence_length=enough), 300, validation=False)
    assert not caplog.text
    data = config(write(tmp_path, [long, short, long, short]), make(tmp_path), sequence_length=40)
    prepare(data, 300, validation=False)
    assert "2 of 4 documents for training are longer than data.sequence_length=40 and lose their ends, 2 of them all" in caplog.text
    (tmp_path / "held").mkdir()
    held = write(tmp_path / "held", [long])
    with pytest.raises(RecipeError, match=r"none of the 1 conversations of .* for validation has an answer within"):
        prepare(replace(data, validation=str(held)), 300)


@pytest.mark.parametrize("at_once", [1, 2, 100])
def test_documents_without_an_answer_that_is_reached_are_counted(at_once: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bagualu.trainer.data.whole._AT_ONCE", at_once)
    starts = np.array([0, 4, 9, 10, 13], np.int64)
    answers = np.array([0, 0, 0, 1, 1, 0, 0, 1, 0, 1, 0, 1, 1], np.uint16)
    documents = Documented(starts, answers, Path("unused"))
    # The first token of a document is predicted from nothing: the answers of the third never count.
    assert [documents.without_labels(length) for length in (1, 2, 3, 9)] == [3, 3, 1, 1]
    assert Documented(starts, None, Path("unused")).without_labels(1) == 0


def test_special_tokens_are_tokens_in_conversations_and_letters_in_text(tmp_path: Path) -> None:
    """So that a corpus cannot bring in tokens that control the model. What the tokenizer's file says of truncation
    has no effect."""
    made = make(tmp_path)
    tokenizer = Tokenizer.from_file(str(made / "tokenizer.json"))
    tokenizer.enable_truncation(5)
    tokenizer.enable_padding(length=50)
    tokenizer.save(str(made / "tokenizer.json"))
    messages = [{"role": "user", "content": words(8, 1)}, {"role": "assistant", "content": words(9, 2)}]
    text, _ = ChatTemplate(made / "tokenizer.json").conversation(messages, "")
    corpus = prepare(config(write(tmp_path, [messages]), made), 300, validation=False)
    tokens = corpus.train[:].tolist()
    assert tokenizer.decode(tokens, skip_special_tokens=False) == text
    assert [token for token in tokens if token < len(SPECIAL)] == [0, 3, 1, 3]
    path = tmp_path / "text.jsonl"
    path.write_text(json.dumps({"text": text}) + "\n")
    corpus = prepare(config(path, made, format=None), 300, validation=False)
    tokens = corpus.train[:].tolist()
    assert [token for token in tokens if token < len(SPECIAL)] == [3], "the end of the document"
    assert tokenizer.decode(tokens[:-1]) == text


def test_records_of_text_may_be_kept_whole_too(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    texts = [words(1 + number % 5, number) for number in range(30)]
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    data = config(path, make(tmp_path), format=None)
    batches = Batches(prepare(data, 300, validation=False), data, seed=2)
    inputs, labels, begins = (np.concatenate(column) for column in zip(*(batches.batch(s, 0, 4) for s in range(20)), strict=True))
    ends = labels == 3  # <|end|>, the eos_token, after each document
    assert ends.sum() > 30
    starts = np.flatnonzero((begins == np.arange(S)).ravel())
    assert set(np.flatnonzero(ends.ravel()) + 1) <= {*starts, ends.size}
    assert inputs.shape == (80, S)


HELLO = {"role": "user", "content": "hello"}
ANSWER = {"role": "assistant", "content": "hi"}
BAD: list[tuple[Any, str, str]] = [
    ([HELLO, ANSWER], "{% generation %}{% endgeneration %}" + TEMPLATE, "the chat template has .* and marks no answer"),
    ("text", TEMPLATE, r"chats\.jsonl, line 2 is no conversation; give a list like \[\{role: user, content: \.\.\.\}, \{role:"),
    ([{"role": "user"}, ANSWER], TEMPLATE, "line 2 is no conversation"),
    ([HELLO], TEMPLATE, "line 2 has no message of the role assistant"),
    ([HELLO, ANSWER, HELLO, ANSWER], TEMPLATE.replace(".content", ".content if loop.last or message.role == 'user'"),
     "line 2: the chat template changes what comes before message 2"),
    ([HELLO, {"role": "tool", "content": ""}, ANSWER],
     "{% for m in messages %}{% if m.role == 'tool' %}{{ raise_exception('no tools') }}{% endif %}{% endfor %}" + TEMPLATE,
     r"line 2: the chat template refuses the conversation \(no tools\)"),
]  # fmt: skip


@pytest.mark.parametrize(("messages", "template", "message"), BAD)
def test_what_is_no_conversation_is_refused_with_its_line(tmp_path: Path, messages: Any, template: str, message: str) -> None:
    data = config(write(tmp_path, [[HELLO, ANSWER], messages]), make(tmp_path, template))
    with pytest.raises(RecipeError, match=message) as error:
        prepare(data, 300, validation=False)
    assert "\n" not in str(error.value)


def test_keys_that_chat_needs_are_asked_for_before_a_run(tmp_path: Path) -> None:
    source, made = write(tmp_path, [[HELLO, ANSWER]] * 9), make(tmp_path)
    check_source(config(source, made), 300)
    for changes in ({"packing": "documents"}, {"tokenizer": None}):
        with pytest.raises(RecipeError, match=r"data\.format=chat needs data\.packing=whole, .* and a data\.tokenizer"):
            config(source, made, **changes).validate()
    with pytest.raises(RecipeError, match=r"line 1 is no conversation"):
        check_source(config(source, made, field="chat"), 300)
    (tmp_path / "text").write_text("words")
    with pytest.raises(RecipeError, match=r"text is no file of records"):
        check_source(config(tmp_path / "text", made), 300)
    np.arange(300, dtype=np.uint16).tofile(tmp_path / "ids.bin")
    with pytest.raises(RecipeError, match=r"data\.packing=whole is for records"):
        prepare(config(tmp_path / "ids.bin", made, format=None), 300)
    (made / "tokenizer_config.json").write_text("{}")
    with pytest.raises(RecipeError, match=r"data\.format=chat needs a chat template, and .*made has none in chat_template\.jinja"):
        check_source(config(source, made), 300)

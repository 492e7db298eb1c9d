"""Growing texts: what is settled, and where they end."""

from itertools import pairwise

import pytest
from tokenizers import Tokenizer

from bagualu.trainer.data.tokenizer import END_OF_FILE, train_tokenizer
from bagualu.trainer.generation.text import GrowingText

TOKENIZER = train_tokenizer(["the cat sat on the mat"] * 3, 280)
END = TOKENIZER.token_to_id(END_OF_FILE)
TURN = "<|im_end|>"


def ids(text):
    return TOKENIZER.encode(text).ids


def grow(text, prompt="", most=100, stop=(), ends=(END,), tokenizer=TOKENIZER):
    growing = GrowingText(tokenizer, ids(prompt), most, stop, ends)
    shown = []
    for token in text if isinstance(text, list) else ids(text):
        growing.add(token)
        shown.append(growing.settled)
        if growing.ended:
            break
    return growing, shown


def test_the_text_is_what_follows_the_prompt():
    growing, shown = grow(" cat sat", prompt="the")
    assert (growing.text, growing.ended, growing.tokens) == (" cat sat", None, ids(" cat sat"))
    assert shown[-1] == " cat sat"
    assert all(later.startswith(earlier) for earlier, later in pairwise(shown))


def test_a_character_of_several_tokens_is_shown_when_it_is_complete():
    assert len(ids("€")) == 3
    _, shown = grow("a€b")
    assert shown == ["a", "a", "a", "a€", "a€b"]
    growing, _ = grow(ids("a€")[:3], most=3)
    assert growing.settled == growing.text == "a�", "there is no more to come"


def test_it_ends_before_a_stop_text_of_which_nothing_is_shown():
    growing, shown = grow("the cat sat on the mat", stop=("on the", "mat"))
    assert (growing.text, growing.ended) == ("the cat sat ", "stop")
    assert shown[-1] == growing.text
    assert all("the cat sat ".startswith(text) for text in shown)
    growing, shown = grow("the cat sat", stop=("satellite",))
    assert (growing.settled, growing.text) == ("the cat ", "the cat sat"), "it may become a satellite"


def test_it_ends_at_the_token_that_ends_a_document_or_at_its_longest():
    growing, _ = grow([*ids("cat"), END, *ids("sat")])
    assert (growing.text, growing.ended, growing.tokens) == ("cat", "end", [*ids("cat"), END])
    growing, _ = grow([*ids("cat"), END, *ids("sat")], ends=())
    assert (growing.text, growing.ended) == ("catsat", None)
    growing, _ = grow(ids("the cat sat")[:2], most=2)
    assert growing.ended == "length"


@pytest.mark.parametrize("ended", [True, False])
def test_without_a_tokenizer_there_are_numbers(ended):
    growing = GrowingText(None, [1, 2], 2 if ended else 3)
    growing.add(7)
    growing.add(0)
    assert (growing.text, growing.settled, growing.ended) == (None, " 7 0", "length" if ended else None)


def test_any_of_several_tokens_ends_it():
    for end in (END, *ids("sat")[:1]):
        growing, _ = grow([*ids("cat"), end, *ids("mat")], ends=(END, *ids("sat")[:1]))
        assert (growing.ended, growing.tokens[-1]) == ("end", end)


@pytest.mark.parametrize(
    ("stop", "before"),
    [(TURN, "the cat sat"), (f"sat{TURN}", "the cat "), (f"{TURN} on", "the cat sat"), ("mat", "the cat sat on the ")],
)
def test_a_stop_text_may_spell_special_tokens_of_which_nothing_is_shown(stop, before):
    tokenizer = Tokenizer.from_str(TOKENIZER.to_str())
    tokenizer.add_special_tokens([TURN, "<|other|>"])
    turn, other = map(tokenizer.token_to_id, (TURN, "<|other|>"))
    tokens = [other, *ids("the cat sat"), turn, *ids(" on the mat"), *ids(" and more")]
    growing, shown = grow(tokens, prompt="a", stop=(stop,), tokenizer=tokenizer)
    assert (growing.text, growing.ended) == (before, "stop")
    assert all(before.startswith(text) for text in shown)
    alone, _ = grow(tokens, prompt="a", stop=("absent",), tokenizer=tokenizer)
    assert (alone.text, alone.ended) == ("the cat sat on the mat and more", None)


def test_a_stop_text_with_special_tokens_in_the_prompt_ends_nothing():
    tokenizer = Tokenizer.from_str(TOKENIZER.to_str())
    tokenizer.add_special_tokens([TURN])
    growing = GrowingText(tokenizer, [*ids("the cat"), tokenizer.token_to_id(TURN)], 100, (TURN,))
    for token in ids("sat"):
        growing.add(token)
    assert (growing.text, growing.ended) == ("sat", None)

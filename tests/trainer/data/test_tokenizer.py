import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from bagualu.trainer.data import tokenizer as module
from bagualu.trainer.data.tokenizer import (
    END_OF_FILE,
    END_OF_FILE_TOKEN,
    Encoder,
    load_tokenizer,
    token_bytes,
    train_tokenizer,
)

CODE = "def f(self, x):\n    return self.x + x  # it's 10 times\n\n\n\tclass A: '''doc'''\r\n"


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer([CODE * 20, "naïve 八卦炉 " * 20], 320)


unicode_texts = st.text(alphabet=st.characters(exclude_categories=["Cs"]))
texts = unicode_texts | st.text(alphabet=" \t\n\r\x0b\x0c\x1c\x1f'sABz09_.é炉")


@given(text=texts)
@example(text=f"a{END_OF_FILE}b")
@example(text="it's I'll 'S ''s  x\n  \n y\x1c z")
def test_every_text_decodes_back_and_the_fast_way_agrees(tokenizer, text):
    tokens = np.frombuffer(Encoder(tokenizer, "uint16").encode(text), np.uint16)
    assert tokens.tolist() == tokenizer.encode(text, add_special_tokens=False).ids
    assert tokenizer.decode(tokens.tolist(), skip_special_tokens=False) == text
    assert END_OF_FILE_TOKEN not in tokens
    assert token_bytes(tokenizer)[tokens].sum() == len(text.encode())


@given(st.lists(texts, max_size=4))
def test_what_was_encoded_before_changes_nothing(tokenizer, parts):
    encoder = Encoder(tokenizer, "uint32")
    for part in [*parts, *parts]:
        assert encoder.encode(part) == Encoder(tokenizer, "uint32").encode(part)


def test_the_cache_of_words_is_bounded(tokenizer, monkeypatch):
    monkeypatch.setattr(module, "_CACHED_BYTES", 50 * 200)
    encoder = Encoder(tokenizer, "uint16")
    for number in range(500):
        text = f" word{number} naïve{number}"
        assert encoder.encode(text) == np.array(tokenizer.encode(text).ids, np.uint16).tobytes()
        assert len(encoder._tokens) < 60


def test_training_again_gives_the_same_tokenizer(tokenizer):
    assert train_tokenizer([CODE * 20, "naïve 八卦炉 " * 20], 320).to_str() == tokenizer.to_str()


def test_a_stored_tokenizer_reads_special_tokens_of_prompts_and_whole_texts(tokenizer, tmp_path):
    tokenizer.enable_truncation(3)
    tokenizer.enable_padding(length=40)
    tokenizer.save(str(tmp_path / "t.json"))
    tokenizer.no_truncation()
    tokenizer.no_padding()
    expected = tokenizer.encode("return self.x").ids
    for special in (False, True):
        stored = load_tokenizer(tmp_path / "t.json", special_tokens=special)
        assert stored.encode("return self.x").ids == expected
        assert next(iter(stored.encode_batch_fast(["return self.x", "a"]))).ids == expected
        assert (stored.encode(f"{END_OF_FILE}return self.x").ids == [END_OF_FILE_TOKEN, *expected]) == special


def test_a_stored_tokenizer_reads_the_end_token_as_text_too(tokenizer, tmp_path):
    tokenizer.save(str(tmp_path / "t.json"))
    stored = load_tokenizer(tmp_path / "t.json")
    assert stored.encode(END_OF_FILE).ids == tokenizer.encode(END_OF_FILE).ids
    assert END_OF_FILE_TOKEN not in stored.encode(END_OF_FILE).ids
    assert token_bytes(stored)[END_OF_FILE_TOKEN] == 0

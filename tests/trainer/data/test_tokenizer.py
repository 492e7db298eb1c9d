import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

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
    tokens = Encoder(tokenizer).encode([text])[0]
    assert tokens.tolist() == tokenizer.encode(text, add_special_tokens=False).ids
    assert tokenizer.decode(tokens.tolist(), skip_special_tokens=False) == text
    assert END_OF_FILE_TOKEN not in tokens
    assert token_bytes(tokenizer)[tokens].sum() == len(text.encode())


def test_texts_of_one_call_and_of_many_agree(tokenizer):
    parts = [CODE, "八卦炉 it's", "", CODE.upper()]
    encoder = Encoder(tokenizer)
    together = Encoder(tokenizer).encode(parts)
    assert all(np.array_equal(a, encoder.encode([part])[0]) for a, part in zip(together, parts, strict=True))


def test_training_again_gives_the_same_tokenizer(tokenizer):
    assert train_tokenizer([CODE * 20, "naïve 八卦炉 " * 20], 320).to_str() == tokenizer.to_str()


def test_a_stored_tokenizer_reads_the_end_token_as_text_too(tokenizer, tmp_path):
    tokenizer.save(str(tmp_path / "t.json"))
    stored = load_tokenizer(tmp_path / "t.json")
    assert stored.encode(END_OF_FILE).ids == tokenizer.encode(END_OF_FILE).ids
    assert END_OF_FILE_TOKEN not in stored.encode(END_OF_FILE).ids
    assert token_bytes(stored)[END_OF_FILE_TOKEN] == 0

import re
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from bagualu.comm.errors import RecipeError
from bagualu.trainer.data import reading
from bagualu.trainer.data.config import DataConfig
from bagualu.trainer.data.corpus import prepare
from bagualu.trainer.data.listing import TextFile
from bagualu.trainer.data.reading import Part, cut, whole
from bagualu.trainer.data.tokenizer import Encoder, train_tokenizer
from tests.trainer.data.conftest import words


def file_of(folder: Path, data: bytes) -> TextFile:
    path = folder / "text"
    path.write_bytes(data)
    status = path.stat()
    return TextFile(str(path), path.name, status.st_size, status.st_mtime_ns)


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer([words(3_000, seed=1), "def f(self):\n    return 'it's'\n" * 20], 400)


texts = st.text(alphabet=" \n\t\r\x1c\u00a0\u3000'slABz09_.,。é炉ß", max_size=60)


@given(text=texts, piece=st.integers(1, 9))
@example(text="it's  I'll\n\n 'S ''s x\r\n y\x1c  z,a'll.b", piece=2)
@example(text="炉炉。炉炉'炉's", piece=3)
def test_the_tokens_of_the_pieces_are_those_of_the_whole(tmp_path_factory, tokenizer, text, piece):
    file = file_of(tmp_path_factory.mktemp("part"), text.encode())
    encoder = Encoder(tokenizer, "uint16")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reading, "PIECE_BYTES", piece)
        pieces = list(whole(file).pieces())
    assert "".join(pieces) == text
    tokens = np.frombuffer(b"".join(map(encoder.encode, pieces)), np.uint16)
    assert tokens.tolist() == tokenizer.encode(text, add_special_tokens=False).ids


def test_a_word_longer_than_any_piece_is_cut(tmp_path, monkeypatch):
    monkeypatch.setattr(reading, "PIECE_BYTES", 10)
    monkeypatch.setattr(reading, "_LONGEST", 40)
    pieces = list(whole(file_of(tmp_path, ("é" * 500).encode())).pieces())
    assert "".join(pieces) == "é" * 500
    assert max(map(len, pieces)) <= 50


@given(text=st.text(alphabet="ab \né炉", min_size=2, max_size=300), share=st.floats(0.05, 0.95), anywhere=st.booleans(),
       block=st.integers(1, 40))  # fmt: skip
def test_a_file_is_cut_between_characters_near_the_share(tmp_path_factory, text, share, anywhere, block):
    file = file_of(tmp_path_factory.mktemp("part"), text.encode())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reading, "PIECE_BYTES", block)
        patch.setattr(reading, "_LINE_BLOCK", block)
        first, second = ("".join(part.pieces()) for part in cut(file, share, anywhere))
    assert first + second == text
    middle = int(len(text) * share)
    if anywhere:  # as earlier versions did with the whole text in memory
        assert len(first) == (text.rfind("\n", 0, middle) + 1 or middle)
    else:
        wide = [len(part.encode()) for part in (text[:middle], text[middle:])]
        assert wide[0] - min(wide) * 0.25 <= len(first.encode()) <= wide[0]


def test_a_cut_is_behind_a_line_else_before_a_word(tmp_path):
    lines = "".join(f"line {number}\n" for number in range(100))
    first, _ = cut(file_of(tmp_path, lines.encode()), 0.75, anywhere=False)
    assert "".join(first.pieces()).endswith("\n")
    first, second = cut(file_of(tmp_path, lines.replace("\n", " ").encode()), 0.75, anywhere=False)
    assert re.fullmatch(r".*\w", "".join(first.pieces()))
    assert "".join(second.pieces()).startswith(" ")


@pytest.mark.parametrize(
    ("data", "byte"), [(b"abc\xff", 3), (b"\xe9", 0), (b"a" * 25 + b"\xe7\x82", 25), (b"12345678\xe7\x82x", 8)]
)
def test_a_byte_that_is_not_utf8_is_named_wherever_the_pieces_end(tmp_path, monkeypatch, data, byte):
    for piece in (1, 2, 9, 100):
        monkeypatch.setattr(reading, "PIECE_BYTES", piece)
        with pytest.raises(RecipeError, match=rf"text is not UTF-8 text \(byte {byte}\); convert it"):
            list(whole(file_of(tmp_path, data)).pieces())


def test_a_file_cut_short_while_it_is_read_is_refused(tmp_path):
    file = file_of(tmp_path, b"some text")
    (tmp_path / "text").write_bytes(b"some")
    with pytest.raises(RecipeError, match="has changed while it was read"):
        list(Part(file, 2, 9).pieces())


def test_preparing_a_text_takes_a_fraction_of_its_bytes_of_memory(tmp_path, monkeypatch):
    monkeypatch.setattr(reading, "PIECE_BYTES", 2**13)
    text = words(2_000, seed=1)
    file = file_of(tmp_path, text.encode() * 400)
    config = DataConfig(source=file.path, sequence_length=16, cache=str(tmp_path / "cache"))
    tracemalloc.start()
    try:
        prepare(config, 300)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < file.size_bytes / 2

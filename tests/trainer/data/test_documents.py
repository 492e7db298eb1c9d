"""Rows of several documents: where documents begin, and what is predicted."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from bagualu.comm.errors import RecipeError
from bagualu.trainer.data.batches import Batches
from bagualu.trainer.data.config import DataConfig
from bagualu.trainer.data.corpus import check_source, prepare
from bagualu.trainer.data.documents import EndToken, IndexedDocuments
from tests.trainer.data.test_token_files import config, write
from tests.trainer.data.token_files import write_llmc, write_megatron

END = 7
LENGTHS = [3, 1, 12, 5, 30, 2, 9, 8, 20, 10]
"""Of documents, the last token of each of which is END. 100 tokens in all."""


def documents() -> list[list[int]]:
    draw = np.random.default_rng(1)
    return [[*draw.integers(10, 60, length - 1).tolist(), END] for length in LENGTHS]


def expected_starts(first: int, count: int) -> list[int]:
    begins = np.cumsum([0, *LENGTHS])
    return [int(begin) - first for begin in begins if first < begin < first + count]


def test_documents_begin_after_an_end_token_and_where_an_index_says() -> None:
    tokens = np.concatenate(documents())
    offsets = np.cumsum([0, *LENGTHS[:-1]]) * 2
    indexed = IndexedDocuments([0], [(offsets, 2)])
    for first in range(92):
        window = tokens[first : first + 9]
        assert EndToken(END).starts(first, window).tolist() == expected_starts(first, 9)
        assert indexed.starts(first, window).tolist() == expected_starts(first, 9)
        skipped = IndexedDocuments([0], [(offsets, 2)], skipped=first)
        assert skipped.starts(0, window).tolist() == expected_starts(first, 9)


def test_documents_of_several_files_and_empty_ones_begin_once() -> None:
    both = IndexedDocuments([0, 10, 20], [(np.array([0, 16, 16]), 4), (np.array([0]), 4), (np.array([0, 8]), 4)])
    for first, starts in ((0, [4, 10, 20, 22]), (4, [6, 16, 18]), (10, [10, 12]), (21, [1])):
        assert both.starts(first, np.zeros(25 - first)).tolist() == starts


def written(folder: Path, kind: str) -> DataConfig:
    tokens = np.concatenate(documents())
    if kind == "llmc":
        write_llmc(folder / "ids.bin", tokens.tolist())
        return config(folder / "ids.bin", packing="documents", end_token=END, validation_fraction=0.2)
    write_megatron(folder / "ids", documents())
    return config(folder / "ids", packing="documents", validation_fraction=0.2)


@pytest.mark.parametrize("kind", ["llmc", "megatron", "megatron with documents of two sequences"])
def test_rows_tell_where_documents_begin_and_predict_nothing_across(tmp_path: Path, kind: str) -> None:
    data, tokens = written(tmp_path, kind), np.concatenate(documents())
    if kind.endswith("sequences"):  # documents 0 and 1 become one, and so on; document 9 is empty
        firsts = np.array([0, 2, 4, 6, 8, 10, 10, 10, 10, 10, 10], np.int64)
        with (tmp_path / "ids.idx").open("r+b") as stream:
            stream.seek(34 + 12 * len(LENGTHS))
            stream.write(firsts.tobytes())
    borders = np.cumsum([0, *LENGTHS])[:: 2 if kind.endswith("sequences") else 1]
    batches = Batches(prepare(data, 300), data, seed=0)
    rows: list[tuple[int, Any]] = [(int(i), batches.batch(0, at, 1)) for at, i in enumerate(batches.sample_ids(0))]
    rows += [(10 + number, batches.validation(number, 1)) for number in range(batches.validation_count)]
    for index, (inputs, labels, begins) in rows:
        for place in range(8):
            at = index * 8 + place
            begin = max(0, *(int(border) - index * 8 for border in borders if border <= at))
            assert inputs[0, place] == tokens[at]
            assert labels[0, place] == (-100 if at + 1 in borders else tokens[at + 1])
            assert begins[0, place] == begin


def test_documents_of_text_end_with_its_files(folder: Path) -> None:
    data = DataConfig(source=str(folder), cache=str(folder.parent / "cache"), packing="documents", sequence_length=64)
    batches = Batches(prepare(data, 300), data, seed=0)
    for step in range(4):
        inputs, labels, begins = batches.batch(step, 0, 16)
        ends = inputs == 0
        assert torch.equal(labels == -100, ends)
        starts = begins == torch.arange(64)
        assert torch.equal(starts[:, 1:], ends[:, :-1])


def test_documents_that_nobody_marks_are_refused(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"data\.packing=documents needs to know where documents end .*; give data\.end_token=ID"):
        check_source(config(write(tmp_path, "nanoGPT"), packing="documents"), 300)
    for wrong, message in (
        ({"source": "random", "packing": "documents"}, "needs documents, which random tokens are not"),
        ({"packing": "mixed"}, "data.packing=mixed is unknown; give one of stream, documents, whole"),
        ({"source": "a.bin", "end_token": 3}, "end_token=3 is for files of token ids with data.packing=documents"),
        ({"source": "a.bin", "end_token": -1, "packing": "documents"}, "end_token=-1 must be at least 0"),
    ):
        with pytest.raises(RecipeError, match=message):
            DataConfig(**wrong).validate()

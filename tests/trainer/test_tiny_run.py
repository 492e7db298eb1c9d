"""The finished main job against the least a language model has to beat: the chance of a byte given the one before."""

import json
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from bagualu.trainer.data.build import documents
from bagualu.trainer.data.config import DataConfig
from bagualu.trainer.data.sources import find_files
from bagualu.trainer.data.split import by_files

START = 256
"""Stands before the first byte of a file."""


def pair_counts(texts: list[bytes]) -> NDArray[np.int64]:
    """How often byte b follows byte a (or the start of a text), [257, 256]."""
    counts = np.zeros((257, 256), np.int64)
    for text in texts:
        if text:
            after = np.frombuffer(text, np.uint8).astype(np.int64)
            before = np.concatenate([[START], after[:-1]])
            counts += np.bincount(before * 256 + after, minlength=257 * 256).reshape(257, 256)
    return counts


def bits_per_byte(train: list[bytes], validation: list[bytes]) -> float:
    """Mean bits that an order-1 byte Markov model with add-one smoothing needs for a byte of `validation`."""
    smoothed = pair_counts(train) + 1.0
    bits = -np.log2(smoothed / smoothed.sum(1, keepdims=True))
    seen = pair_counts(validation)
    return float((bits * seen).sum() / seen.sum())


def corpus_bits_per_byte(config: DataConfig) -> float:
    """The same for the two splits of a corpus."""
    splits: tuple[list[bytes], list[bytes]] = ([], [])
    files = find_files(config.source)
    for document in documents(files, by_files(files, config.validation_fraction), config.source):
        splits[document.validation].append("".join(document.part.pieces()).encode())
    return bits_per_byte(*splits)


def test_the_baseline_on_texts_worked_out_by_hand():
    """ab, ab, a, b: a starts 2 of 3 texts and is followed by b twice; b starts one and is followed by nothing."""
    bits = bits_per_byte([b"abab", b"a", b"b"], [b"ab", b""])
    assert bits == pytest.approx(-(math.log2(3 / 259) + math.log2(3 / 258)) / 2)


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_the_main_job_beats_the_baseline(tmp_path):
    command = [str(Path(sys.executable).with_name("bagualu")), "train", "recipe=tiny", f"run.dir={tmp_path / 'run'}"]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-4000:]
    reached = json.loads((tmp_path / "run" / "summary.json").read_text())["validation_bits_per_byte"]
    baseline = corpus_bits_per_byte(DataConfig(source="stdlib"))
    assert 3 < baseline < 5
    assert reached < baseline

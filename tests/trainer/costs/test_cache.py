"""Measured once for what it depends on, and again when it is not there, damaged, or of something else."""

import json
import logging
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from bagualu.parallel.layout import Layout
from bagualu.trainer.costs.cache import figures
from bagualu.trainer.costs.work import ModelWork
from bagualu.trainer.models.decoder.config import ModelConfig

WORK = ModelWork(ModelConfig(2, 16, 2, 2, 24, 32), Layout(), sequence_length=8, micro_batch=1, dtype="float32")
CPU = torch.device("cpu")


def stored(cache: Path) -> list[Path]:
    return sorted((cache / "costs").iterdir())


def test_what_was_measured_is_read_back(tmp_path: Path) -> None:
    first = figures(tmp_path, WORK, CPU)
    assert figures(tmp_path, WORK, CPU) == first  # times never repeat to the last digit
    assert len(stored(tmp_path)) == 1


@pytest.mark.parametrize(
    "other",
    [
        replace(WORK, micro_batch=2), replace(WORK, sequence_length=4), replace(WORK, dtype="float64"),
        replace(WORK, layout=Layout(tensor=2)), replace(WORK, model=replace(WORK.model, ffn=32)),
    ],
)  # fmt: skip
def test_other_work_is_measured_anew(tmp_path: Path, other: ModelWork) -> None:
    figures(tmp_path, WORK, CPU)
    figures(tmp_path, other, CPU)
    assert len(stored(tmp_path)) == 2


def test_more_replicas_or_stages_are_not_other_work(tmp_path: Path) -> None:
    first = figures(tmp_path, WORK, CPU)
    assert figures(tmp_path, replace(WORK, layout=Layout(pipeline=2, data=4), zero=0), CPU) == first


@pytest.mark.parametrize("damage", ["", "{", "[]", '{"depends_on": {}, "figures": {}}'])
def test_a_damaged_file_is_measured_again(tmp_path: Path, damage: str, caplog: pytest.LogCaptureFixture) -> None:
    figures(tmp_path, WORK, CPU)
    (path,) = stored(tmp_path)
    path.write_text(damage)
    with caplog.at_level(logging.WARNING):
        again = figures(tmp_path, WORK, CPU)
    assert "damaged" in caplog.text
    assert json.loads(path.read_text())["figures"]["attention"]["forward_seconds"] == again["attention"].forward_seconds


def test_a_folder_that_cannot_be_written_does_not_stop_a_run(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "costs").write_text("a file where the folder should be")
    with caplog.at_level(logging.WARNING):
        assert set(figures(tmp_path, WORK, CPU)) == {"embedding", "attention", "feed-forward", "head"}
    assert "data.cache=FOLDER" in caplog.text

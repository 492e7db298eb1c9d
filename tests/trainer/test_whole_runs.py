"""Runs on whole documents: each is trained on once an epoch, however often the run stops and with how many ranks it goes on."""

import json
from functools import partial
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from bagualu.comm.group import Communicator
from bagualu.parallel.vocabulary import IGNORED
from bagualu.trainer import run as whole_run
from bagualu.trainer.assemble import TrainerState, assemble
from bagualu.trainer.recipe.config import Recipe
from bagualu.trainer.recipe.preflight import check_run_directory
from tests.harness import run
from tests.trainer.data.conftest import words
from tests.trainer.data.test_records import make_tokenizer
from tests.trainer.test_run import recipe_in

TEXTS = [f"document {number}: {words(number % 7, number)}" for number in range(40)]
GLOBAL_BATCH = 4
Read = dict[tuple[int, int], list[str]]
"""By step (from 0) and position in the global batch, the documents of the sequence that a rank was given."""


class Noting:
    """Batches that note the documents that they hand out."""

    def __init__(self, batches: Any, tokenizer: Tokenizer, read: Read) -> None:
        self.batches, self.tokenizer, self.read = batches, tokenizer, read

    def __getattr__(self, name: str) -> Any:
        return getattr(self.batches, name)

    def batch(self, step: int, start: int, count: int) -> Any:
        tensors = self.batches.batch(step, start, count)
        for position, row in enumerate(zip(*(tensor.tolist() for tensor in tensors), strict=True), start):
            texts = self.documents(*row)
            assert self.read.setdefault((step, position), texts) == texts, "the ranks of a pipeline read the same"
        return tensors

    def documents(self, inputs: list[int], labels: list[int], begins: list[int]) -> list[str]:
        texts = []
        for begin in sorted(set(begins)):
            places = [place for place in range(len(begins)) if begins[place] == begin]
            if labels[begin] != IGNORED:  # else it is left over
                texts.append(self.tokenizer.decode([*(inputs[place] for place in places), labels[places[-1]]]))
        return texts


def goes_on(communicator: Communicator, recipe: Recipe, read: Read) -> int:
    """A start of the run; returns the number of sequences in an epoch."""
    check_run_directory(recipe)
    counts = []

    def noting(*arguments: Any) -> TrainerState:
        state = assemble(*arguments)
        counts.append(state.batches.train_count)
        tokenizer = Tokenizer.from_file(str(state.corpus.tokenizer_path))
        state.batches = Noting(state.batches, tokenizer, read)  # type: ignore[assignment]
        return state

    whole_run.train(recipe, communicator, assemble=noting)
    return counts[0]


LAYOUTS: list[tuple[int, dict[str, object]]] = [
    (3, {"parallel__data": 2}),
    (4, {"parallel__data": 4}),
    (9, {"parallel__data": 1, "parallel__pipeline": 2}),
    (10, {"parallel__data": 1}),
    (15, {"parallel__data": 2, "parallel__tensor": 2}),
]
"""The step at which each start ends, and its layout."""


def test_each_document_is_trained_on_once_an_epoch_whatever_the_ranks_of_each_start(tmp_path: Path) -> None:
    path = tmp_path / "texts.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    fixed: dict[str, object] = {
        "data__source": str(path), "data__cache": str(tmp_path / "cache"), "data__tokenizer": str(make_tokenizer(tmp_path)),
        "data__packing": "whole", "data__sequence_length": 64, "data__global_batch": GLOBAL_BATCH, "model__vocab": 320,
        "train__validation_sequences": 0, "checkpoint__every": 1, "checkpoint__resume": True, "data__workers": 0,
    }  # fmt: skip
    whole: Read = {}
    done = 0
    for steps, layout in LAYOUTS:
        read: Read = {}
        recipe = recipe_in(tmp_path / "run", **fixed, **layout, train__steps=steps)
        epoch = run("simulated", recipe.world_size(), partial(goes_on, read=read), recipe)[0]
        assert sorted(read) == [(step, position) for step in range(done, steps) for position in range(GLOBAL_BATCH)]
        whole |= read
        done = steps
    sequences = [whole[at] for at in sorted(whole)]
    assert len(TEXTS) > epoch > GLOBAL_BATCH
    assert len(sequences) >= 3 * epoch
    for first in range(0, len(sequences) - epoch + 1, epoch):
        assert sorted(text for texts in sequences[first : first + epoch] for text in texts) == sorted(TEXTS)
    orders = [sequences[first : first + epoch] for first in (0, epoch)]
    assert orders[0] != orders[1]

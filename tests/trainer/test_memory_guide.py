"""Every command of the memory guide that trains does so, with a small model: tests/test_architecture.py checks it as it is."""

import shlex
from pathlib import Path
from typing import Any

import pytest

from bagualu.comm.group import Communicator
from bagualu.trainer.recipe.compose import compose
from bagualu.trainer.recipe.config import Recipe
from bagualu.trainer.run import train
from bagualu.trainer.settle import settle
from tests.harness import run

GUIDE = Path(__file__).parents[2] / "docs/guides/memory.md"
COMMANDS = [line.strip() for line in GUIDE.read_text().splitlines() if line.startswith("    bagualu train ")]
SMALL = shlex.split(
    "model.layers=2 model.hidden=24 model.heads=2 model.kv_heads=2 model.ffn=24 model.vocab=64 data.sequence_length=8 "
    "data.global_batch=4 data.source=random train.micro_batch=1 train.steps=2 train.validation_sequences=0 checkpoint.every=0 "
    "comm.backend=gloo log.progress=off"
)


def trained(communicator: Communicator, recipe: Recipe) -> dict[str, Any]:
    return train(recipe, communicator)


@pytest.mark.parametrize("command", COMMANDS)
def test_the_commands_of_the_guide_train(command: str, tmp_path: Path) -> None:
    recipe = compose([*SMALL, *shlex.split(command)[2:], f"run.dir={tmp_path}/run"])
    recipe, _ = settle(recipe, recipe.world_size(), recipe.world_size())
    for summary in run("gloo", recipe.world_size(), trained, recipe):
        assert (summary["ended"], summary["step"]) == ("done", 2)
        assert summary["memory"]["measured"] > 0


def test_the_guide_has_commands() -> None:
    assert len(COMMANDS) >= 7

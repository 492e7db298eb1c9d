"""Every command of the models guide trains, with a small model, and the guide has every option."""

import shlex
from pathlib import Path

import pytest

from bagualu.trainer.models.decoder.config import CHOICES
from bagualu.trainer.recipe.compose import compose
from tests.harness import run
from tests.trainer.test_memory_guide import SMALL, trained

GUIDE = (Path(__file__).parents[2] / "docs/guides/models.md").read_text(encoding="utf-8")
COMMANDS = [line.strip() for line in GUIDE.splitlines() if line.startswith("    bagualu train ")]


@pytest.mark.parametrize("command", COMMANDS)
def test_the_commands_of_the_guide_train(command: str, tmp_path: Path) -> None:
    recipe = compose([*shlex.split(command)[2:], *SMALL, f"run.dir={tmp_path}/run"])
    for summary in run("gloo", recipe.world_size(), trained, recipe):
        assert (summary["ended"], summary["step"]) == ("done", 2)


def test_the_guide_names_every_choice() -> None:
    for key, choices in CHOICES.items():
        (row,) = (line for line in GUIDE.splitlines() if line.startswith(f"| `model.{key}` |"))
        assert all(f"`{choice}`" in row for choice in choices)
        assert set(choices[1:]) <= {word for command in COMMANDS for word in command.replace("=", " ").split()} | {"none"}

"""Every command of the data guide that trains does so, with a small model: tests/test_architecture.py checks it as it is."""

import shlex
from pathlib import Path

import pytest

from bagualu.trainer.recipe.compose import compose
from tests.harness import run
from tests.trainer.data.conftest import words
from tests.trainer.data.token_files import write_examples
from tests.trainer.test_memory_guide import trained

GUIDE = Path(__file__).parents[2] / "docs/guides/data.md"
COMMANDS = [line.strip() for line in GUIDE.read_text().splitlines() if line.startswith("    bagualu train ")]
SMALL = shlex.split(
    "model.layers=2 model.hidden=24 model.heads=2 model.kv_heads=2 model.ffn=24 model.vocab=300 data.sequence_length=16 "
    "data.global_batch=4 train.micro_batch=1 train.steps=2 train.validation_sequences=2 checkpoint.every=0 comm.backend=simulated "
    "log.progress=off data.cache=cache data.validation_fraction=0.2"
)


@pytest.mark.parametrize("command", COMMANDS)
def test_the_commands_of_the_guide_train(command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my_texts").mkdir()
    for number in range(20):
        (tmp_path / "my_texts" / str(number)).write_text(words(400, number))
    write_examples(tmp_path)
    longer = ["data.sequence_length=64"] if "chat" in command else []  # an answer begins after 16 tokens
    recipe = compose([*shlex.split(command)[2:], *SMALL, *longer, "run.dir=run"])
    for summary in run("simulated", recipe.world_size(), trained, recipe):
        assert (summary["ended"], summary["step"]) == ("done", 2)
        assert summary["validation_loss"] > 0


def test_the_guide_has_commands() -> None:
    assert len(COMMANDS) >= 4

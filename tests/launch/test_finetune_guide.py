"""The commands of the guide to fine-tuning, one after the other, with a small model: what one makes, the next goes on from."""

import json
import shlex
import shutil
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM

from bagualu.launch.cli import main
from bagualu.trainer.models.decoder.lora import LoraConfig
from tests.trainer.data.conftest import words
from tests.trainer.data.token_files import write_examples
from tests.trainer.models.hugging_face import published

GUIDE = (Path(__file__).parents[2] / "docs/guides/finetune.md").read_text(encoding="utf-8")
COMMANDS = [shlex.split(line)[1:] for line in GUIDE.splitlines() if line.startswith("    bagualu ")]
SMALL = shlex.split(
    "data.sequence_length=16 data.global_batch=4 train.micro_batch=1 train.validation_sequences=2 train.steps=2 checkpoint.every=2 "
    "optim.warmup_steps=1 data.cache=cache data.validation_fraction=0.2 log.progress=off"
)
BASE = shlex.split(
    "data.source=my_texts model.layers=4 model.hidden=16 model.heads=4 model.kv_heads=2 model.ffn=24 model.vocab=300 train.steps=4"
)


def smaller(command: list[str]) -> list[str]:
    """The command with a small model and few steps."""
    match command[0]:
        case "train":
            fsdp = "parallel.engine=fsdp" in command
            backend = "comm.backend=gloo" if fsdp else "comm.backend=simulated"
            length = ["data.sequence_length=64"] if "data.format=chat" in command else []
            more = BASE if "recipe=tiny_dense" in command else ["train.steps=3"] if "checkpoint.resume=true" in command else []
            return [*command, *SMALL, backend, *length, *more]
        case "generate":
            return [*command, "--max-new-tokens", "3"]
    return command


def test_the_commands_of_the_guide_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my_texts").mkdir()
    for number in range(20):
        (tmp_path / "my_texts" / str(number)).write_text(words(400, number))
    write_examples(tmp_path)
    monkeypatch.setitem(published.SIZES, "vocab_size", 300)
    published.publish("qwen3", tmp_path / "published")
    shutil.copytree(tmp_path / "tokenizer", tmp_path / "published", dirs_exist_ok=True)
    assert {command[0] for command in COMMANDS} == {"train", "generate", "evaluate", "checkpoint"}
    for command in COMMANDS:
        assert main(smaller(command)) == 0, command
    runs = {path.name: json.loads((path / "summary.json").read_text()) for path in (tmp_path / "runs").iterdir()}
    assert runs["factors"]["step"] == 3
    assert {summary["step"] for name, summary in runs.items() if name not in ("tiny_dense", "factors")} == {2}
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "tuned")
    assert sum(parameter.numel() for parameter in model.parameters()) == runs["full"]["parameters"]
    assert runs["factors"]["parameters"] > runs["full"]["parameters"]


def test_the_guide_names_every_key_of_the_factors() -> None:
    for key in vars(LoraConfig()):
        assert f"| `model.lora.{key}` |" in GUIDE

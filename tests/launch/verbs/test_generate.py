"""`bagualu generate`: prompts in, text out, and whatever is wrong in one line. A run of four steps is trained once."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from bagualu.launch.cli import main
from bagualu.launch.verbs import command_line, generate, usage
from bagualu.trainer.data.tokenizer import END_OF_FILE, END_OF_FILE_TOKEN, load_tokenizer
from bagualu.trainer.generation.request import Sampling
from tests.texts import FURNACE

ROOT = Path(__file__).parents[3]
GUIDE = (ROOT / "docs/guides/generate.md").read_text(encoding="utf-8")
COMMANDS = [line.strip() for line in GUIDE.splitlines() if line.startswith("    bagualu generate ")]
SMALL = [
    "recipe=tiny", "model.layers=2", "model.hidden=16", "model.heads=4", "model.kv_heads=2", "model.ffn=24", "model.vocab=300",
    "model.moe.experts=2", "model.moe.ffn=8", "data.sequence_length=16", "data.global_batch=4", "train.micro_batch=1",
    "train.steps=4", "checkpoint.every=2", "train.validation_sequences=0", "parallel.pipeline=1", "comm.backend=simulated",
    "log.progress=off",
]  # fmt: skip


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A folder with runs/tiny, trained on a text, and runs/random, trained on random tokens."""
    folder = tmp_path_factory.mktemp("generate")
    (folder / "text").mkdir()
    shutil.copy(FURNACE, folder / "text")
    words = [*SMALL, f"data.cache={folder}/cache"]
    assert main(["train", *words, f"data.source={folder}/text", f"run.dir={folder}/runs/tiny"]) == 0
    random = ["data.source=random", "model.positions=learned", "model.max_positions=20", "train.steps=1", "parallel.data=2"]
    assert main(["train", *words, *random, f"run.dir={folder}/runs/random"]) == 0
    return folder


@pytest.fixture
def here(runs, monkeypatch):
    monkeypatch.chdir(runs)
    return runs


def documents(capsys, *words):
    capsys.readouterr()
    assert main(["generate", *words, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_texts_are_written_behind_their_prompts(here, capsys):
    words = ["runs/tiny", "--prompt", "bagualu ", "--prompt=", "--max-new-tokens", "12"]
    document = documents(capsys, *words)
    first, second = document["samples"]
    assert (first["prompt"], second["prompt"]) == ("bagualu ", "")
    assert all(len(sample["tokens"]) == 12 or sample["ended"] == "end" for sample in (first, second))
    tokenizer = load_tokenizer(here / "runs/tiny/tokenizer.json")
    assert first["text"] == tokenizer.decode(tokenizer.encode("bagualu ").ids + first["tokens"])[len("bagualu ") :]
    assert main(["generate", *words]) == 0
    out, err = capsys.readouterr()
    assert out == f"── 1 of 2\nbagualu {first['text']}\n\n── 2 of 2\n{second['text']}\n"
    assert re.search(r"bagualu: \d+ tokens in .* tokens/s, one rank$", err.strip().splitlines()[-1])


def test_special_tokens_of_a_prompt_are_tokens(here):
    tokenizer = here / "runs/tiny/tokenizer.json"
    plain = load_tokenizer(tokenizer).encode("bagualu ").ids
    prompts = generate._encoded([f"{END_OF_FILE}bagualu ", "", (5, 6)], tokenizer)
    assert prompts == [(END_OF_FILE_TOKEN, *plain), (END_OF_FILE_TOKEN,), (5, 6)]


def test_a_checkpoint_gives_what_the_model_was_then_and_the_run_what_it_is_now(here, capsys):
    words = ["--tokens", "5,6,7", "--max-new-tokens", "20", "--ignore-eos", "train.dtype=float64"]
    newest = documents(capsys, "runs/tiny", *words)
    assert newest["checkpoint"].endswith("step-00000004")
    steps = [documents(capsys, f"runs/tiny/checkpoints/step-0000000{step}", *words) for step in (2, 4)]
    assert steps[1]["samples"] == newest["samples"]
    assert steps[0]["checkpoint"].endswith("step-00000002")


@pytest.mark.parametrize("layout", [["parallel.tensor=2"], ["parallel.pipeline=2"], ["parallel.expert=2"], ["parallel.data=3"]])
def test_layouts_give_the_same_samples(here, capsys, layout):
    words = ["runs/tiny", "--prompt", "train", "--prompt", "a run of", "--max-new-tokens", "8", "train.dtype=float64"]
    alone = documents(capsys, *words)
    document = documents(capsys, *words, *layout, "comm.backend=simulated")
    assert document["samples"] == alone["samples"]
    assert layout[0].removeprefix("parallel.").replace("=", " ") in document["layout"]
    assert main(["generate", *words, *layout, "comm.backend=simulated"]) == 0
    text = capsys.readouterr().out
    assert all(f"{sample['prompt']}{sample['text']}\n" in text for sample in alone["samples"])


def test_worker_processes_write_the_same_text(here, capsys):
    words = ["runs/tiny", "--prompt", "train", "--max-new-tokens", "8", "train.dtype=float64"]
    before = set((here / "runs/tiny").rglob("*"))
    (alone,) = documents(capsys, *words)["samples"]
    command = [sys.executable, "-m", "bagualu.launch.cli", "generate", *words, "parallel.tensor=2"]
    done = subprocess.run(command, capture_output=True, text=True, encoding="utf-8", env={**os.environ, "PYTHONUTF8": "1"})
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"train{alone['text']}\n"
    assert set((here / "runs/tiny").rglob("*")) == before, "nothing is written there"


def test_prompts_of_a_file_and_of_stdin_are_lines(here, capsys, monkeypatch, tmp_path):
    import io

    (tmp_path / "prompts.txt").write_text("one\ntwo\n")
    monkeypatch.setattr("sys.stdin", io.StringIO("three"))
    words = ["--prompt-file", f"{tmp_path}/prompts.txt", "--prompt-file", "-", "--max-new-tokens", "1"]
    assert [sample["prompt"] for sample in documents(capsys, "runs/tiny", *words)["samples"]] == ["one", "two", "three"]


def test_a_text_ends_before_a_stop_text(here, capsys):
    words = ["runs/tiny", "--prompt", "the", "--max-new-tokens", "12", "--ignore-eos"]
    (whole,) = documents(capsys, *words)["samples"]
    stop = whole["text"][2:4]
    (sample,) = documents(capsys, *words, "--stop", stop)["samples"]
    assert (sample["text"], sample["ended"]) == (whole["text"][: whole["text"].index(stop)], "stop")


def test_a_run_on_random_tokens_takes_and_gives_tokens(here, capsys):
    words = ["runs/random", "--tokens", "5,6", "--max-new-tokens", "3"]
    (sample,) = documents(capsys, *words)["samples"]
    assert (sample["prompt"], sample["text"], len(sample["tokens"])) == (None, None, 3)
    assert main(["generate", *words]) == 0
    assert capsys.readouterr().out == "5 6 " + " ".join(map(str, sample["tokens"])) + "\n"


@pytest.mark.parametrize(
    ("words", "fix"),
    [
        ([], "e.g. bagualu generate runs/tiny --prompt 'def '"),
        (["recipe=tiny", "--prompt", "a"], "e.g. bagualu generate runs/tiny --prompt 'def '"),
        (["runs/tny", "--prompt", "a"], "runs/tny does not exist; give the directory of a run"),
        (["text", "--prompt", "a"], "text is neither a run nor a checkpoint"),
        (
            ["published", "--prompt", "a"],
            "published is a model of Hugging Face; give a run that begins with it, which `bagualu checkpoint "
            "import published to=runs/published` makes",
        ),
        (["runs/begun", "--prompt", "a"], "runs/begun has no checkpoint yet; one is saved every checkpoint.every steps"),
        (["runs/tiny"], "there is no prompt; give --prompt TEXT"),
        (["runs/tiny", "--prompt"], "--prompt takes a value, e.g. --prompt 'def '"),
        (["runs/tiny", "--promt", "a"], "did you mean --prompt?"),
        (
            ["runs/tiny", "--prompt", "a", "--temperature", "-1"],
            "--temperature -1 must be 0 (the most probable token) or more",
        ),
        (["runs/tiny", "--prompt", "a", "--temperature", "hot"], "--temperature hot is not a number; give e.g. --temperature 0"),
        (["runs/tiny", "--prompt", "a", "--seed=1.5"], "--seed 1.5 is not a whole number"),
        (["runs/tiny", "--prompt", "a", "--seed=1", "--seed=2"], "--seed is given twice, as 1 and 2; give one"),
        (["runs/tiny", "--prompt", "a", "--max-new-tokens", "0"], "give 1 or more"),
        (["runs/tiny", "--prompt", "a", "--top-p", "0.9"], "--top-p changes nothing where the most probable token is taken"),
        (["runs/tiny", "--prompt", "a", "--top-p", "0", "--temperature", "1"], "--top-p 0 must be more than 0 and at most 1"),
        (["runs/tiny", "--prompt", "a", "--min-p", "2", "--temperature", "1"], "--min-p 2 must lie between 0 and 1"),
        (["runs/tiny", "--prompt", "a", "--repetition-penalty", "0"], "--repetition-penalty 0 must be more than 0"),
        (["runs/tiny", "--prompt", "a", "--stop", ""], "would end every text before it begins"),
        (["runs/tiny", "--tokens", "1,two"], "--tokens 1,two are no numbers with commas between them"),
        (
            ["runs/tiny", "--tokens", "1,300"],
            "the prompt has token 300, but the model has model.vocab=300; give tokens",
        ),
        (["runs/tiny", "--prompt-file", "no.txt"], "--prompt-file no.txt cannot be read (No such file or directory)"),
        (["runs/random", "--prompt", "a"], "has none (its tokens are random); give the prompt as --tokens 5,17,101"),
        (["runs/random", "--tokens", "1", "--stop", "a"], "--stop needs a tokenizer"),
        (["runs/random", "--tokens", "1,2"], "--max-new-tokens 128 are more than model.max_positions=20; give --max-new-tokens 18"),
        (["runs/random", "--tokens", ",".join(["1"] * 20)], "which leave none of model.max_positions=20 for new ones"),
        (
            ["runs/tiny", "--prompt", "a", "parallel.tensor=3"],
            "model.heads=4 is not divisible by parallel.tensor=3; give",
        ),
        (["runs/tiny", "--prompt", "a", "parallel.tensor=0"], "parallel.tensor=0"),
        (["runs/tiny", "--prompt", "a", "parallel.pipeline=3"], "give parallel.pipeline=2 or less"),
        (["runs/tiny", "--prompt", "a", "parallel.expert=4"], "model.moe.experts=2 is not divisible by parallel.expert=4"),
        (["runs/tiny", "--prompt", "a", "paralel.tensor=2"], "parallel.tensor"),
        (
            ["runs/tiny", "--prompt", "a", "model.layers=3"],
            "model.layers is that of the run; `bagualu generate` takes",
        ),
        (
            ["runs/tiny", "--prompt", "a", "train.steps=3"],
            "train.steps changes nothing here; `bagualu generate` takes",
        ),
        (["runs/tiny", "--prompt", "a", "parallel.tensor=1,2"], "generate with each value by itself"),
    ],
)
def test_wrong_input_is_one_line_with_the_fix(here, capsys, words, fix):
    if "runs/begun" in words:
        (here / "runs/begun").mkdir()
        shutil.copy(here / "runs/tiny/config.yaml", here / "runs/begun/config.yaml")
    if "published" in words:
        (here / "published").mkdir()
        (here / "published/config.json").write_text("{}")
    capsys.readouterr()
    assert main(["generate", *words]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert len(err.splitlines()) == 1
    assert fix in err


def test_help_says_what_the_defaults_are():
    assert f"default {Sampling().max_new_tokens}\n" in usage.page("generate")
    for option, verbs in command_line._OPTIONS.items():
        assert (f"  {option}" in usage.page("generate") or f", {option}" in usage.page("generate")) == ("generate" in verbs)


@pytest.mark.parametrize("command", COMMANDS)
def test_the_commands_of_the_guide_generate(here, capsys, command):
    (here / "prompts.txt").write_text("def \nimport \n")
    ranks = [] if "comm.backend" in command or "parallel" not in command else ["comm.backend=simulated"]
    assert main([*shlex.split(command)[1:], *ranks]) == 0
    assert capsys.readouterr().out

"""`bagualu evaluate`: the loss that training measured too, the same in every layout, and other text by hand."""

import json
import math
import shlex
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from bagualu.comm import simulated
from bagualu.launch.cli import main
from bagualu.launch.verbs.command_line import _OPTIONS
from bagualu.launch.verbs.usage import page
from bagualu.trainer.data import text_corpus
from bagualu.trainer.data.tokenizer import END_OF_FILE_TOKEN, load_tokenizer
from bagualu.trainer.generation.find import compose_layout, find_model
from bagualu.trainer.generation.stages import load_stages
from tests.launch.verbs.test_generate import ROOT, SMALL
from tests.texts import FURNACE, LAKE

GUIDE = (ROOT / "docs/guides/generate.md").read_text(encoding="utf-8")
COMMANDS = [line.strip() for line in GUIDE.splitlines() if line.startswith("    bagualu evaluate ")]
LENGTH = 16


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A folder with runs/tiny and its summary, trained on a text; runs/unkept, without validation; runs/random."""
    folder = tmp_path_factory.mktemp("evaluate")
    for name, words in (("text", FURNACE), ("my_texts", LAKE)):
        (folder / name).mkdir()
        shutil.copy(words, folder / name)
    words = [*SMALL, "train.dtype=float64", "train.micro_batch=2", f"data.cache={folder}/cache"]
    kept = ["train.validation_sequences=1000", "data.validation_fraction=0.2", f"data.source={folder}/text"]
    assert main(["train", *words, *kept, f"run.dir={folder}/runs/tiny"]) == 0
    assert main(["train", *words, f"data.source={folder}/text", "train.steps=1", f"run.dir={folder}/runs/unkept"]) == 0
    assert main(["train", *words, "data.source=random", "train.steps=1", f"run.dir={folder}/runs/random"]) == 0
    return folder


@pytest.fixture
def here(runs, monkeypatch):
    monkeypatch.chdir(runs)
    return runs


def document(capsys, *words):
    capsys.readouterr()
    assert main(["evaluate", *words, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_on_the_text_kept_for_validation_it_is_what_training_measured(here, capsys):
    summary = json.loads((here / "runs/tiny/summary.json").read_text())
    found = document(capsys, "runs/tiny")
    assert found["loss"] == pytest.approx(summary["validation_loss"], rel=1e-12)
    assert found["bits_per_byte"] == pytest.approx(summary["validation_bits_per_byte"], rel=1e-12)
    assert found["perplexity"] == pytest.approx(math.exp(found["loss"]), rel=1e-12)
    assert found["tokens"] == found["sequences"] * LENGTH
    assert found["checkpoint"].endswith("step-00000004")
    assert main(["evaluate", "runs/tiny"]) == 0
    assert f"{found['loss']:.4f} nats/token" in capsys.readouterr().out


@pytest.mark.parametrize("layout", [["parallel.tensor=2"], ["parallel.pipeline=2"], ["parallel.expert=2"], ["parallel.data=3"]])
def test_layouts_give_the_same_loss(here, capsys, layout):
    words = ["runs/tiny", "sequences=7"]
    alone = document(capsys, *words)
    found = document(capsys, *words, *layout, "comm.backend=simulated")
    assert alone["sequences"] == found["sequences"] == 7
    assert found["loss"] == pytest.approx(alone["loss"], rel=1e-9)
    assert found["bits_per_byte"] == pytest.approx(alone["bits_per_byte"], rel=1e-9)
    assert found["tokens"] == alone["tokens"]


def decoder_of(folder: Path) -> torch.nn.Module:
    """The model of runs/tiny in this process."""
    trained = find_model(folder / "runs/tiny")
    recipe = compose_layout("evaluate", trained, [], str(folder), "")
    (decoder,) = simulated.run(1, lambda communicator: load_stages(recipe, communicator, trained.checkpoint).model)
    return decoder


def by_hand(folder: Path, text: str) -> tuple[float, float]:
    """Nats per token and bits per byte of all whole sequences of the text."""
    decoder = decoder_of(folder)
    tokenizer = load_tokenizer(folder / "runs/tiny/tokenizer.json")
    tokens = [*tokenizer.encode(text).ids, END_OF_FILE_TOKEN]
    nats, count, size = 0.0, 0, 0
    for start in range(0, (len(tokens) - 1) // LENGTH * LENGTH, LENGTH):
        window = tokens[start : start + LENGTH + 1]
        with torch.no_grad():
            logits = decoder(torch.tensor([window[:-1]]))[0][0]
        nats += float(F.cross_entropy(logits, torch.tensor(window[1:]), reduction="sum"))
        count += LENGTH
        size += len(tokenizer.decode(window[1:]).encode(errors="replace"))
    return nats / count, nats / math.log(2) / size


def test_on_other_text_all_of_it_is_read_with_the_tokenizer_of_the_run(here, capsys):
    loss, bits = by_hand(here, (here / "my_texts/lake.md").read_text())
    found = document(capsys, "runs/tiny", "data.source=my_texts")
    assert (found["loss"], found["bits_per_byte"]) == (pytest.approx(loss, rel=1e-9), pytest.approx(bits, rel=0.01))
    assert found["source"] == "my_texts"
    assert document(capsys, "runs/unkept", "data.source=my_texts")["loss"] != found["loss"]


def test_other_text_is_prepared_once_for_all_ranks_and_kept(here, capsys, tmp_path, monkeypatch):
    built, plain = [], text_corpus.build_records
    monkeypatch.setattr(text_corpus, "build_records", lambda *args: built.append(args) or plain(*args))
    words = ["runs/tiny", "data.source=my_texts", f"data.cache={tmp_path}/cache"]
    first = document(capsys, *words, "parallel.data=3", "comm.backend=simulated")
    assert len(built) == 1
    assert len(list((tmp_path / "cache").glob("*/train.bin"))) == 1
    assert document(capsys, *words)["loss"] == pytest.approx(first["loss"], rel=1e-9)
    assert len(built) == 1


def test_sequences_are_as_long_as_the_context_or_the_text(here, capsys, tmp_path):
    """The context is that of the model of Hugging Face with which a run began, if that is longer than the run's sequences."""
    shutil.copytree(here / "runs/tiny", tmp_path / "run")
    (tmp_path / "run/hugging_face").mkdir()
    (tmp_path / "run/hugging_face/config.json").write_text('{"max_position_embeddings": 50}')
    assert document(capsys, f"{tmp_path}/run", "data.source=my_texts")["sequence_length"] == 50
    assert document(capsys, f"{tmp_path}/run", "data.source=my_texts", "data.sequence_length=7")["sequence_length"] == 7
    assert document(capsys, f"{tmp_path}/run")["sequence_length"] == LENGTH, "as it was trained"
    (tmp_path / "short.txt").write_text("a short text")
    short = document(capsys, f"{tmp_path}/run", f"data.source={tmp_path}/short.txt")
    tokens = load_tokenizer(here / "runs/tiny/tokenizer.json").encode("a short text").ids
    assert (short["sequences"], short["sequence_length"], short["tokens"]) == (1, len(tokens), len(tokens))
    np.arange(30, dtype=np.uint16).tofile(tmp_path / "ids.bin")
    assert document(capsys, f"{tmp_path}/run", f"data.source={tmp_path}/ids.bin")["sequence_length"] == 29


def test_random_tokens_have_a_loss_and_no_bytes(here, capsys):
    found = document(capsys, "runs/random")
    assert (found["sequences"], found["bits_per_byte"]) == (64, None)
    assert found["loss"] == pytest.approx(math.log(300), rel=0.05)


def test_other_data_are_read_as_the_keys_say(here, capsys, tmp_path):
    text = (here / "my_texts/lake.md").read_text()
    loss = document(capsys, "runs/tiny", "data.source=my_texts")["loss"]
    for name, words in (("a.jsonl", []), ("a.dat", ["data.format=jsonl"])):
        (tmp_path / name).write_text(json.dumps({"words": text}) + "\n")
        found = document(capsys, "runs/tiny", f"data.source={tmp_path}/{name}", "data.field=words", *words)
        assert found["loss"] == pytest.approx(loss, rel=1e-12)
    ids = np.arange(100) % 9 * 30
    ids.astype(np.uint16).tofile(tmp_path / "narrow.bin")
    ids.astype(np.uint32).tofile(tmp_path / "wide.dat")
    narrow = document(capsys, "runs/tiny", f"data.source={tmp_path}/narrow.bin")
    wide = document(capsys, "runs/tiny", f"data.source={tmp_path}/wide.dat", "data.format=llmc", "data.token_dtype=uint32")
    assert (wide["loss"], wide["tokens"]) == (narrow["loss"], narrow["tokens"])


def test_documents_are_evaluated_each_by_itself_if_that_is_asked_for(here, capsys, tmp_path):
    first, second = [5, 60, 9, 9, 17, 7], [33, 1, 44, 2, 7]
    for name, ids in (("first", first), ("second", second), ("both", first + second)):
        np.array(ids, np.uint16).tofile(tmp_path / f"{name}.bin")
    losses = [document(capsys, "runs/tiny", f"data.source={tmp_path}/{name}.bin") for name in ("first", "second")]
    words = ["data.packing=documents", "data.end_token=7"]
    both = document(capsys, "runs/tiny", f"data.source={tmp_path}/both.bin", *words)
    assert both["tokens"] == sum(found["tokens"] for found in losses) == 9
    assert both["loss"] == pytest.approx(sum(found["loss"] * found["tokens"] for found in losses) / 9, rel=1e-9)
    together = document(capsys, "runs/tiny", f"data.source={tmp_path}/both.bin")["loss"]
    # By how much it differs depends on the text on which the model was trained.
    assert together != pytest.approx(both["loss"], rel=1e-6)


def test_of_conversations_the_answers_are_evaluated(here, capsys, tmp_path):
    shutil.copytree(here / "runs/tiny", tmp_path / "run")
    template = "{% for message in messages %}({{ message.role }}){{ message.content }};{% endfor %}"
    (tmp_path / "run/chat_template.jinja").write_text(template + "{% if add_generation_prompt %}(assistant){% endif %}")
    texts = "(user)a run?;(assistant)many ranks;(user)b;(assistant)c;"
    messages = [{"role": role, "content": words} for role, words in
                (("user", "a run?"), ("assistant", "many ranks"), ("user", "b"), ("assistant", "c"))]  # fmt: skip
    (tmp_path / "chats.jsonl").write_text(json.dumps({"messages": messages}) + "\n")
    words = [f"data.source={tmp_path}/chats.jsonl", "data.format=chat", "data.sequence_length=100"]
    found = document(capsys, f"{tmp_path}/run", *words)
    encoding = load_tokenizer(here / "runs/tiny/tokenizer.json").encode(texts)
    spans = [(texts.index(answer), texts.index(answer) + len(answer)) for answer in ("many ranks;", "c;")]
    wanted = [number for number, (first, after) in enumerate(encoding.offsets) if any(first < b and a < after for a, b in spans)]
    with torch.no_grad():
        logits = decoder_of(here)(torch.tensor([encoding.ids[:-1]]))[0][0].log_softmax(-1)
    nats = -sum(float(logits[number - 1, encoding.ids[number]]) for number in wanted)
    assert (found["tokens"], found["loss"]) == (len(wanted), pytest.approx(nats / len(wanted), rel=1e-9))
    assert found["sequence_length"] <= len(encoding.ids), "padding would only take memory"


def test_a_blend_of_the_run_is_evaluated_as_it_was_in_training(here, capsys, tmp_path):
    generator = np.random.default_rng(0)
    sources = [f"{tmp_path}/{name}.bin" for name in ("a", "b")]
    for number, source in enumerate(sources):
        generator.integers(100 * number, 100 * number + 50, 2000).astype(np.uint16).tofile(source)
    blend = (
        "data.blend=["
        + ",".join(f"{{source: {source}, weight: {weight}}}" for source, weight in zip(sources, (3, 1), strict=True))
        + "]"
    )
    words = [
        *SMALL,
        "train.dtype=float64",
        f"data.cache={here}/cache",
        "train.validation_sequences=1000",
        f"run.dir={tmp_path}/run",
    ]
    assert main(["train", *words, blend]) == 0
    summary = json.loads((tmp_path / "run/summary.json").read_text())
    found = document(capsys, f"{tmp_path}/run")
    assert found["loss"] == pytest.approx(summary["validation_loss"], rel=1e-12)
    assert found["source"] == ", ".join(sources)
    alone = document(capsys, f"{tmp_path}/run", f"data.source={sources[1]}", "data.sequence_length=16")
    assert (alone["source"], alone["tokens"]) == (sources[1], 1999 // 16 * 16)
    assert main(["evaluate", f"{tmp_path}/run", "data.source=stdlib"]) == 2
    assert "data.source=stdlib is text, and the run of" in capsys.readouterr().err
    generator.integers(0, 50, 2000).astype(np.uint16).tofile(sources[0])
    assert main(["evaluate", f"{tmp_path}/run"]) == 2
    assert f"the tokens of {sources[0]} in data.blend are not those that the run was trained on" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "fix"),
    [
        ([], "e.g. bagualu evaluate runs/tiny"),
        (["runs/tny"], "runs/tny does not exist"),
        (["runs/tiny", "sequences=0"], "sequences=0"),
        (["runs/tiny", "sequences=many"], "sequences=many"),
        (["runs/tiny", "data.source=nothing"], "data.source=nothing is not there"),
        (["runs/tiny", "data.sequence_length=100000"], "give data.sequence_length="),
        (["runs/tiny", "parallel.tensor=3"], "model.heads=4 is not divisible by parallel.tensor=3"),
        (["runs/tiny", "model.layers=3"], "model.layers is that of the run; `bagualu evaluate` takes data.source"),
        (["runs/tiny", "data.global_batch=3"], "data.global_batch changes nothing here"),
        (["runs/unkept"], "the run keeps no text for validation (train.validation_sequences=0); give other text as data.source"),
        (
            ["runs/tiny", "data.format=jsonl"],
            "data.format says how other data are read, and those of the run are read as it has read them",
        ),
        (["runs/tiny", "data.source=my_texts", "data.packing=some"], "data.packing=some is unknown; give one of"),
        (
            ["runs/tiny", "data.source=my_texts", "data.format=chat"],
            "data.format=chat needs a chat template, and",
        ),
        (["runs/tiny", "data.source=my_texts", "data.token_dtype=uint32"], "data.token_dtype=uint32 is for files of token ids"),
        (["runs/tiny", "train.micro_batch=auto"], "train.micro_batch=auto is for training; give a number"),
        (["runs/tiny", "train.micro_batch=some"], "train.micro_batch=some must be at least 1, a whole number"),
        (["runs/tiny", "data.source=my_texts", "data.tokenizer=tokenizer.json"], "data.tokenizer changes nothing here"),
        (["runs/random", "data.source=my_texts"], "keeps no tokenizer.json to read it with; leave data.source out"),
    ],
)
def test_wrong_input_is_one_line_with_the_fix(here, capsys, words, fix):
    capsys.readouterr()
    assert main(["evaluate", *words]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert len(err.splitlines()) == 1
    assert fix in err


def test_text_that_has_changed_is_not_taken_for_text_that_the_model_has_not_seen(here, capsys, tmp_path):
    (tmp_path / "text").mkdir()
    shutil.copy(here / "text/furnace.md", tmp_path / "text")
    words = [f"data.source={tmp_path}/text", f"run.dir={tmp_path}/run", "train.validation_sequences=4", f"data.cache={here}/cache"]
    assert main(["train", *SMALL, *words, "train.steps=1"]) == 0
    with (tmp_path / "text/furnace.md").open("a") as file:
        file.write("and one more line\n")
    capsys.readouterr()
    assert main(["evaluate", f"{tmp_path}/run"]) == 2
    assert "is not the one that the run was trained on" in capsys.readouterr().err


@pytest.mark.parametrize("command", COMMANDS)
def test_the_commands_of_the_guide_evaluate(here, capsys, command):
    assert main(shlex.split(command)[1:]) == 0
    assert capsys.readouterr().out


def test_help_names_the_options():
    assert all(("evaluate" in verbs) == (option in page("evaluate")) for option, verbs in _OPTIONS.items())

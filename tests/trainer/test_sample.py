"""Samples during training: the same text on every layout and engine, and a state that does not feel them."""

import functools
import shutil
from collections.abc import Callable
from contextlib import redirect_stderr
from io import StringIO
from pathlib import Path

import pytest
from tokenizers import Tokenizer

from bagualu.comm.group import Communicator
from bagualu.parallel.config import ParallelConfig
from bagualu.trainer import run as whole_run
from bagualu.trainer.data.batches import Batches
from bagualu.trainer.data.chat import ChatTemplate
from bagualu.trainer.data.corpus import prepare
from bagualu.trainer.data.tokenizer import load_tokenizer
from bagualu.trainer.recipe.config import Recipe
from bagualu.trainer.sample import beginning
from tests.harness import run
from tests.parity import small_recipe
from tests.texts import FURNACE
from tests.trainer.data.test_chat import conversation, make, write

MOE = {"model__moe__experts": 4, "model__moe__ffn": 8, "model__moe__every": 2}
LAYOUTS: list[dict[str, object]] = [
    {"parallel__tensor": 2, "parallel__sequence": True},
    {"parallel__pipeline": 2, "parallel__schedule": "zb_v", "parallel__virtual_stages": 2},
    {"parallel__data": 2, "parallel__expert": 2},
    {"parallel__data": 2, "parallel__zero": 3},
]


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("text")
    shutil.copy(FURNACE, folder)
    return folder


def recipe_in(folder: Path, text: Path, **changes: object) -> Recipe:
    words = {"train__steps": 3, "train__sample_every": 2, "data__source": str(text), "data__cache": str(text.parent / "cache")}
    return small_recipe(run__dir=str(folder), model__vocab=300, log__progress="off", **MOE, **{**words, **changes})


def trained(communicator: Communicator, recipe: Recipe) -> float:
    return float(whole_run.train(recipe, communicator)["loss"])


def sampled(communicator: Communicator, recipe: Recipe) -> tuple[float, list[str]]:
    """The loss and what was printed, in a process of its own."""
    with redirect_stderr(StringIO()) as err:
        loss = trained(communicator, recipe)
    return loss, samples(err.getvalue())


def samples(err: str) -> list[str]:
    """The first line of each sample, and the indented lines below it."""
    found: list[str] = []
    inside = False
    for line in err.splitlines():
        inside = line.endswith(": a sample") or (inside and line.startswith("    "))
        found += [line] if inside else []
    return found


def test_samples_come_every_so_often_and_at_the_end_alike_on_every_layout(
    tmp_path: Path, text: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (loss,) = run("simulated", 1, trained, recipe_in(tmp_path / "alone", text))
    wanted = samples(capfd.readouterr().err)
    assert [line for line in wanted if line.startswith("step ")] == ["step 2: a sample", "step 3: a sample"]
    assert len(wanted) >= 4
    assert load_tokenizer(tmp_path / "alone/tokenizer.json").get_vocab_size() == 300
    for number, layout in enumerate(LAYOUTS):
        recipe = recipe_in(tmp_path / str(number), text, **layout)
        losses = run("simulated", recipe.world_size(), trained, recipe)
        assert samples(capfd.readouterr().err) == wanted, layout
        assert losses == pytest.approx([loss] * len(losses), rel=1e-9)
    quiet = recipe_in(tmp_path / "quiet", text, train__sample_every=0)
    assert run("simulated", 1, trained, quiet) == [loss], "bit for bit"
    assert samples(capfd.readouterr().err) == []


ENGINES: list[dict[str, object]] = [
    {"parallel__engine": "fsdp", "parallel__data": 2, "parallel__pipeline": 2, "parallel__schedule": "gpipe"},
    {"parallel__engine": "deepspeed", "parallel__data": 2, "parallel__zero": 3},
]
MORE_ENGINES: list[dict[str, object]] = [
    {"parallel__engine": "fsdp", "parallel__data": 2},
    {"parallel__engine": "deepspeed", "parallel__data": 2, "parallel__zero": 1},
]


WHOLE = {"parallel__bucket_bytes": ParallelConfig.bucket_bytes}


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory, text: Path) -> Callable[[str], tuple[float, list[str]]]:
    """alone(dtype) -> the loss and the samples of a run of one process, which is trained once."""

    @functools.cache
    def of(dtype: str) -> tuple[float, list[str]]:
        folder = tmp_path_factory.mktemp("alone")
        ((loss, wanted),) = run("gloo", 1, sampled, recipe_in(folder, text, train__dtype=dtype, **WHOLE))
        assert len(wanted) >= 4
        return loss, wanted

    return of


@pytest.mark.parametrize("layout", [*ENGINES, *(pytest.param(one, marks=pytest.mark.slow) for one in MORE_ENGINES)], ids=str)
def test_other_engines_make_up_the_same_samples_and_train_on(
    tmp_path: Path, text: Path, layout: dict[str, object], alone: Callable[[str], tuple[float, list[str]]]
) -> None:
    dtype = "float32" if layout["parallel__engine"] == "deepspeed" else "float64"
    loss, wanted = alone(dtype)
    recipe = recipe_in(tmp_path / "run", text, train__dtype=dtype, **WHOLE, **layout)
    found = run("gloo", recipe.world_size(), sampled, recipe)
    assert [lines for _, lines in found] == [wanted] + [[]] * (recipe.world_size() - 1)
    assert [loss for loss, _ in found] == pytest.approx([loss] * len(found), rel=1e-9 if dtype == "float64" else 2e-5)


def test_random_tokens_are_not_shown(tmp_path: Path, text: Path, capfd: pytest.CaptureFixture[str]) -> None:
    recipe = recipe_in(tmp_path, text, data__source="random", train__steps=1, train__sample_every=1)
    run("simulated", 1, trained, recipe)
    assert samples(capfd.readouterr().err) == []
    assert not (tmp_path / "tokenizer.json").exists()


def conversations_in(folder: Path, **changes: object) -> Recipe:
    chats = write(folder, [conversation(number, turns=1 + number % 2) for number in range(30)])
    fixed = {"data__format": "chat", "data__packing": "whole", "data__sequence_length": 64, "data__tokenizer": str(make(folder))}
    return recipe_in(folder / "run", chats, **{**fixed, **changes})


def test_a_sample_of_conversations_answers_one_and_ends_with_the_mark_of_the_template(tmp_path: Path) -> None:
    """Token 0, <|user|>, neither begins them nor ends an answer."""
    for kept in (True, False):
        data = conversations_in(tmp_path).data
        corpus = prepare(data, 300, validation=kept)
        prompt, end = beginning(corpus, Batches(corpus, data, seed=0), data.packing, 0)
        assert corpus.tokenizer_path is not None
        tokenizer, template = Tokenizer.from_file(str(corpus.tokenizer_path)), ChatTemplate(corpus.tokenizer_path)
        questions = []
        for number in range(30):
            messages = conversation(number)
            questions.append(template.render(messages[:-1], asks=True))
        assert tokenizer.decode(prompt, skip_special_tokens=False) in questions
        assert end == tokenizer.token_to_id("<|end|>")


def test_an_answer_whose_end_the_template_does_not_mark_ends_with_the_tokenizers_end(tmp_path: Path) -> None:
    plain = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"
    (tmp_path / "plain").mkdir()
    recipe = conversations_in(tmp_path, data__tokenizer=str(make(tmp_path / "plain", plain)))
    corpus = prepare(recipe.data, 300)
    prompt, end = beginning(corpus, Batches(corpus, recipe.data, seed=0), recipe.data.packing, 0)
    tokenizer = Tokenizer.from_file(str(corpus.tokenizer_path))
    assert tokenizer.decode(prompt).endswith("\nassistant: ")
    assert end == tokenizer.token_to_id("<|end|>"), "the eos_token"


def test_a_sample_of_documents_kept_apart_begins_as_one_of_them(tmp_path: Path, text: Path) -> None:
    """What follows the end of another is never predicted there."""
    for packing in ("documents", "stream"):
        data = recipe_in(tmp_path, text, data__packing=packing, data__validation_fraction=0.1).data
        corpus = prepare(data, 300)
        prompt, end = beginning(corpus, Batches(corpus, data, seed=0), packing, 0)
        assert end == 0
        assert prompt == ([0] if packing == "stream" else [int(corpus.validation[:1][0])])


def test_a_run_on_conversations_shows_question_and_answer(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    recipe = conversations_in(tmp_path, train__steps=1, train__sample_every=1)
    run("simulated", 1, trained, recipe)
    shown = samples(capfd.readouterr().err)
    assert shown[0] == "step 1: a sample"
    assert shown[1].startswith(("    <|system|>rules", "    <|user|>"))
    assert any("<|assistant|>" in line for line in shown)

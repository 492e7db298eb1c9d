"""lm-evaluation-harness drives a checkpoint: its scores are those computed by hand, on tasks that are made here."""

import json
import math
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, processors

from bagualu.comm.errors import RecipeError
from bagualu.comm.group import Communicator
from bagualu.trainer import run as whole_run
from bagualu.trainer.recipe.compose import save_recipe
from bagualu.trainer.recipe.config import Recipe
from tests.harness import run
from tests.parity import small_recipe

pytest.importorskip("lm_eval")

from bagualu.trainer.generation import harness
from bagualu.trainer.generation.harness import HarnessModel
from tests.texts import FURNACE

SEQUENCE = 8


def trained(communicator: Communicator, recipe: Recipe) -> None:
    whole_run.train(recipe, communicator)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("harness")
    (folder / "text").mkdir()
    shutil.copy(FURNACE, folder / "text")
    recipe = small_recipe(run__dir=str(folder / "run"), data__source=str(folder / "text"), data__cache=str(folder / "cache"),
                          model__vocab=300, log__progress="off", train__validation_sequences=0)  # fmt: skip
    save_recipe(recipe)
    run("simulated", 1, trained, recipe)
    return folder


@pytest.fixture(scope="module")
def model(folder: Path) -> HarnessModel:
    return HarnessModel(str(folder / "run"), batch=2, max_length=64)


def by_hand(model: HarnessModel, tokens: list[int], scored: int) -> tuple[float, bool]:
    """Returns the log-likelihood of the last `scored` tokens and whether each is the most probable, computed without a cache and
    without other sequences."""
    with torch.no_grad():
        logits = model._stages.model(torch.tensor([tokens[:-1]]))[0][0, -scored:]
    wanted = torch.tensor(tokens[-scored:])
    return float(logits.log_softmax(-1)[range(scored), wanted].sum()), bool((logits.argmax(-1) == wanted).all())


def asked(*args: Any) -> SimpleNamespace:
    return SimpleNamespace(args=args)


def test_log_likelihoods_are_those_by_hand(model: HarnessModel) -> None:
    pairs = [("bagualu train", " recipe=tiny"), ("", "the run"), ("a ", "checkpoint of any layout, and more of it"), ("x", "y")]
    found = model.loglikelihood([asked(*pair) for pair in pairs], disable_tqdm=True)
    for (context, continuation), (value, greedy) in zip(pairs, found, strict=True):
        whole = model.tok_encode(context + continuation)
        before = len(model.tok_encode(context.rstrip()))
        tokens = whole if context else [0, *whole]
        scored = len(whole) - before
        assert (pytest.approx(value, rel=1e-9), greedy) == by_hand(model, tokens, scored)


def test_a_text_is_scored_in_windows_of_the_length_that_was_trained(folder: Path) -> None:
    model = HarnessModel(str(folder / "run"))
    text = "Bagualu trains dense and mixture-of-experts decoders over many ranks."
    tokens, total = [0, *model.tok_encode(text)], 0.0
    for start in range(0, len(tokens) - 1, SEQUENCE):
        scored = tokens[start + 1 : start + 1 + SEQUENCE]
        first = max(0, start + len(scored) - SEQUENCE)
        total += by_hand(model, tokens[first : start + 1 + len(scored)], len(scored))[0]
    assert model.loglikelihood_rolling([asked(text)]) == [pytest.approx(total, rel=1e-9)]


def test_windows_are_as_long_as_the_context_or_shorter_if_that_is_asked_for(folder: Path, tmp_path: Path) -> None:
    """The context is that of the model of Hugging Face with which a run began, however short its own sequences are."""
    shutil.copytree(folder / "run", tmp_path / "run")
    (tmp_path / "run/hugging_face").mkdir()
    (tmp_path / "run/hugging_face/config.json").write_text(json.dumps({"max_position_embeddings": 20}))
    text = "Bagualu trains dense and mixture-of-experts decoders over many ranks."
    for options, length in (({}, 20), ({"max_length": 5}, 5)):
        model = HarnessModel(str(tmp_path / "run"), **options)
        tokens, total = [0, *model.tok_encode(text)], 0.0
        assert len(tokens) > 2 * length
        for start in range(0, len(tokens) - 1, length):
            scored = tokens[start + 1 : start + 1 + length]
            first = max(0, start + len(scored) - length)
            total += by_hand(model, tokens[first : start + 1 + len(scored)], len(scored))[0]
        assert model.loglikelihood_rolling([asked(text)]) == [pytest.approx(total, rel=1e-9)]


def test_a_long_context_loses_its_beginning(folder: Path) -> None:
    model = HarnessModel(str(folder / "run"))
    context, continuation = "many ranks of a run of many ranks", " and more"
    found = model.loglikelihood([asked(context, continuation), asked("a", "b")], disable_tqdm=True)
    tokens = model.tok_encode(context + continuation)
    scored = len(tokens) - len(model.tok_encode(context))
    assert 0 < scored < SEQUENCE < len(tokens) - 1
    assert (pytest.approx(found[0][0], rel=1e-9), found[0][1]) == by_hand(model, tokens[-(SEQUENCE + 1) :], scored)
    assert found[0][0] != pytest.approx(by_hand(model, tokens, scored)[0], rel=1e-3)
    (text,) = model.generate_until([asked(context, {"until": [], "max_gen_toks": 3})])
    (short,) = model.generate_until([asked(model._text.decode(model.tok_encode(context)[-5:]), {"until": [], "max_gen_toks": 3})])
    assert text == short


def test_what_cannot_be_read_at_once_is_refused(folder: Path) -> None:
    model = HarnessModel(str(folder / "run"))
    with pytest.raises(
        RecipeError, match=r"a continuation has \d+ tokens, and the model reads max_length=8 at once; give shorter ones"
    ):
        model.loglikelihood([asked("a", " continuation that has far too many tokens")], disable_tqdm=True)
    with pytest.raises(RecipeError, match=r"max_gen_toks=8 of the task leaves no room .* give max_gen_toks=7 or less"):
        model.generate_until([asked("a", {"until": [], "max_gen_toks": 8})])
    assert len(model.tok_encode(model.generate_until([asked("the", {"until": []})])[0])) <= SEQUENCE


def test_the_token_that_begins_texts_comes_before_a_text_without_context(folder: Path, tmp_path: Path) -> None:
    """Where the tokenizer has one, as in the model of Hugging Face of the harness; and only once."""
    shutil.copytree(folder / "run", tmp_path / "run")
    tokenizer = Tokenizer.from_file(str(tmp_path / "run/tokenizer.json"))
    begin, name = 65, tokenizer.id_to_token(65)
    tokenizer.add_special_tokens([name])
    tokenizer.post_processor = processors.TemplateProcessing(single=f"{name} $A", special_tokens=[(name, begin)])
    tokenizer.save(str(tmp_path / "run/tokenizer.json"))
    (tmp_path / "run/tokenizer_config.json").write_text(json.dumps({"bos_token": name}))
    model = HarnessModel(str(tmp_path / "run"), max_length=64)
    assert (model.prefix_token_id, model.eot_token_id) == (begin, 0)
    tokens = model.tok_encode("run", add_special_tokens=False)
    assert model.tok_encode("run") == model.tok_encode(f"{name}run") == [begin, *tokens]
    value, _ = by_hand(model, [begin, *tokens], len(tokens))
    assert model.loglikelihood([asked("", "run")], disable_tqdm=True)[0][0] == pytest.approx(value, rel=1e-9)
    assert model.loglikelihood_rolling([asked("run")]) == [pytest.approx(value, rel=1e-9)]


def test_special_tokens_of_a_prompt_are_tokens(model: HarnessModel) -> None:
    assert model.tok_encode("a<|endoffile|>b") == [*model.tok_encode("a"), 0, *model.tok_encode("b")]


@pytest.mark.parametrize("words", [{"batch": 0}, {"max_length": -1}])
def test_sizes_that_mean_nothing_are_refused(folder: Path, words: dict[str, int]) -> None:
    with pytest.raises(RecipeError, match=r"must be at least 1; give e\.g\."):
        HarnessModel(str(folder / "run"), **words)  # type: ignore[arg-type]


def test_contexts_are_continued_in_batches_as_they_are_alone(model: HarnessModel, monkeypatch: pytest.MonkeyPatch) -> None:
    greedy, drawn = {"until": [], "max_gen_toks": 6}, {"until": [], "max_gen_toks": 6, "do_sample": True}
    contexts = ["the ", "a run of many ranks ", "x", "bagualu train "]
    requests = [asked(context, options) for options in (greedy, drawn) for context in contexts[: 3 if options is greedy else 4]]
    sizes, plain = [], harness.generate

    def noted(stages: Any, prompts: Any, *others: Any) -> bool:
        sizes.append(len(prompts))
        return plain(stages, prompts, *others)

    monkeypatch.setattr(harness, "generate", noted)
    together = model.generate_until(requests)
    assert sizes == [2, 1, 2, 2]
    monkeypatch.setattr(model, "_batch", 1)
    assert model.generate_until(requests) == together
    assert len(set(together)) > 3


def test_generation_is_greedy_and_ends_at_a_text(model: HarnessModel) -> None:
    (whole,) = model.generate_until([asked("the ", {"until": [], "max_gen_toks": 12})])
    with torch.no_grad():
        first = int(model._stages.model(torch.tensor([model.tok_encode("the ")]))[0][0, -1].argmax())
    assert whole.startswith(model._text.decode([first]))
    stop = whole[1:3]
    assert len(stop) == 2
    (cut,) = model.generate_until([asked("the ", {"until": [stop], "max_gen_toks": 12, "do_sample": False})])
    assert cut == whole[: whole.index(stop)]


def test_a_task_of_multiple_choice_runs(model: HarnessModel, tmp_path: Path) -> None:
    import lm_eval

    choices = [" tiny", " a layout of ranks"]
    documents = [{"question": f"run {number} of", "choices": choices, "answer": number % 2} for number in range(4)]
    (tmp_path / "task.jsonl").write_text("\n".join(map(json.dumps, documents)))
    files = {"data_files": {"test": str(tmp_path / "task.jsonl")}, "cache_dir": str(tmp_path / "cache")}
    task = {
        "task": "local", "dataset_path": "json", "dataset_kwargs": files,
        "test_split": "test", "output_type": "multiple_choice", "doc_to_text": "question", "doc_to_choice": "choices",
        "doc_to_target": "answer", "target_delimiter": "", "metric_list": [{"metric": "acc"}],
    }  # fmt: skip
    results = lm_eval.simple_evaluate(model, tasks=[task], bootstrap_iters=0)
    right = 0
    for document in documents:
        scores = model.loglikelihood([asked(document["question"], choice) for choice in document["choices"]], disable_tqdm=True)
        right += max(range(2), key=lambda choice: scores[choice][0]) == document["answer"]
    assert math.isclose(results["results"]["local"]["acc,none"], right / len(documents))


def test_a_run_without_text_is_refused(tmp_path: Path) -> None:
    recipe = small_recipe(run__dir=str(tmp_path / "run"), log__progress="off", train__steps=1)
    save_recipe(recipe)
    run("simulated", 1, trained, recipe)
    with pytest.raises(RecipeError, match="keeps no tokenizer"):
        HarnessModel(str(tmp_path / "run"))

"""Which tokens begin and end texts, by the files beside a tokenizer."""

import json
import shutil
from pathlib import Path

from tokenizers import Tokenizer

from bagualu.trainer.data.tokenizer import END_OF_FILE, train_tokenizer
from bagualu.trainer.data.tokenizer_files import begin_token_of, end_token_of, end_tokens_of

NAMES = ["<s>", "<|im_end|>", "<|eot|>"]


def made(folder: Path) -> tuple[Tokenizer, Path, list[int]]:
    """A tokenizer, its file, and the ids of END_OF_FILE and NAMES."""
    folder.mkdir(exist_ok=True)
    tokenizer = train_tokenizer(["the cat sat"], 270)
    tokenizer.add_special_tokens(NAMES)
    tokenizer.save(str(folder / "tokenizer.json"))
    return tokenizer, folder / "tokenizer.json", [tokenizer.token_to_id(name) for name in (END_OF_FILE, *NAMES)]


def write(path: Path, **fields: object) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(fields))


def test_all_tokens_that_end_a_text_are_known_the_one_of_the_tokenizer_first(tmp_path: Path) -> None:
    tokenizer, path, (usual, _, turn, eot) = made(tmp_path / "made")
    assert (end_token_of(tokenizer, path), end_tokens_of(tokenizer, path)) == (usual, [usual])
    write(path.parent / "tokenizer_config.json", eos_token={"content": "<|im_end|>"})
    write(path.parent / "config.json", eos_token_id=eot)
    assert (end_token_of(tokenizer, path), end_tokens_of(tokenizer, path)) == (turn, [turn, eot])
    write(path.parent / "generation_config.json", eos_token_id=[usual, turn])
    assert end_tokens_of(tokenizer, path) == [turn, usual], "config.json is for models without a generation_config.json"
    for nothing in ("{", "[]", '{"eos_token_id": [null, "a"]}'):
        (path.parent / "generation_config.json").write_text(nothing)
        assert end_tokens_of(tokenizer, path) == [turn]


def test_a_run_has_those_of_the_model_that_it_began_with_if_its_tokenizer_is_the_same(tmp_path: Path) -> None:
    tokenizer, path, (usual, _, turn, _) = made(tmp_path / "run")
    write(tmp_path / "run/hugging_face/generation_config.json", eos_token_id=[turn])
    assert end_tokens_of(tokenizer, path) == [usual]
    shutil.copy(path, tmp_path / "run/hugging_face/tokenizer.json")
    assert end_tokens_of(tokenizer, path) == [usual, turn]


def test_the_token_that_begins_a_text_is_the_one_that_is_named(tmp_path: Path) -> None:
    tokenizer, path, (_, begin, _, _) = made(tmp_path / "made")
    assert begin_token_of(tokenizer, path) is None
    for fields, wanted in (({"bos_token": "<s>"}, begin), ({"bos_token": {"content": "<s>"}}, begin), ({"bos_token": None}, None)):
        write(path.parent / "tokenizer_config.json", **fields)
        assert begin_token_of(tokenizer, path) == wanted

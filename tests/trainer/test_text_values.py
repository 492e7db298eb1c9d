"""A value of a text key stays as typed: on the command line, in recipe files, in config.yaml, whatever else it looks like."""

import shlex
from io import StringIO
from pathlib import Path

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf

from bagualu.comm.errors import RecipeError
from bagualu.trainer.recipe.compose import as_dict, compose, load_recipe, parse, resolved_yaml, save_recipe
from bagualu.trainer.recipe.config import Recipe
from bagualu.trainer.recipe.override_text import quoted
from bagualu.trainer.recipe.yaml_text import read_yaml

LOOKS_LIKE_SOMETHING_ELSE = [
    *("2024_01_01", "2024-01-01", "2024_01", "1e3", "0x10", "0b101", "0o17", "007", "010", "3.10", ".5", "1_000.5", "-0", "+1"),
    *("true", "True", "yes", "No", "on", "off", "y", "null", "Null", "nan", "inf", "-inf", ".inf", "12:30:00", "1:30", "1:30.5"),
    *(
        "é",
        "八卦炉",
        "🔥",
        "e\u0301",
        "\u0661\u0662",
        "a:b",
        "a b",
        "a=b",
        "a#b",
        "a;b",
        "a&b",
        "a'b",
        'a"b',
        "a(b)",
        "a^b",
        "it's",
        "-x",
    ),
    *(
        "100%",
        "$HOME",
        "a@b",
        "a!b",
        "a*b",
        "&x",
        "*x",
        "|",
        ">",
        "!x",
        "%x",
        "@x",
        "`x`",
        "a\\b",
        "C:\\x",
        "x[1]",
        "x{y}",
        "a/b.txt",
    ),
]
ONLY_IN_QUOTES = [" x ", "a,b", "a, b", "[a]", "{a: 1}", "'x'", '"x"', "", "choice(a,b)", "int(3)", "\\,", "a\nb", "x\\", "a\x85b"]


@pytest.mark.parametrize("text", ["2024_01_01", "1e3", "true", "null", "007", "12:30:00", "八卦炉", "a'b", "a(b)", "f(a[1])"])
def test_text_is_kept_as_typed_whichever_way_it_is_given(text):
    assert compose([f"++run.name={text}"]).run.name == text
    recipe = compose([f"run={{name: {text}, seed: 3}}", f"launch.slurm.setup=[{text}, {text}]"])
    assert (recipe.run.name, recipe.run.seed, recipe.launch.slurm.setup) == (text, 3, [text, text])


def test_text_is_kept_as_typed_in_a_list():
    texts = [*LOOKS_LIKE_SOMETHING_ELSE, *map(quoted, ONLY_IN_QUOTES)]
    kept = [*LOOKS_LIKE_SOMETHING_ELSE, *ONLY_IN_QUOTES]
    assert compose([f"launch.slurm.setup=[{', '.join(texts)}]"]).launch.slurm.setup == kept


def test_text_is_kept_as_typed_by_itself():
    """Without the rest of the recipe, which takes long to compose."""
    for text in LOOKS_LIKE_SOMETHING_ELSE:
        (override,) = parse([f"run.name={text}"])
        assert override.value() == text
    for text in ONLY_IN_QUOTES:
        (override,) = parse([f"run.name={quoted(text)}"])
        assert override.value() == text


def test_text_is_kept_through_config_yaml(tmp_path):
    texts = [*LOOKS_LIKE_SOMETHING_ELSE, *ONLY_IN_QUOTES]
    for field in (f"run.name={quoted('1e3')}", f"run.name={quoted(' é, ')}"):
        recipe = compose([field, "data.cache=2024_01", f"run.dir={tmp_path}"])
        recipe.launch.slurm.setup = texts
        path = save_recipe(recipe)
        assert load_recipe(path) == recipe
        assert yaml.safe_load(path.read_text(encoding="utf-8")) == as_dict(recipe)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.lists(st.text(st.characters(codec="utf-8"), max_size=8) | st.text("\\${}'\"a:, []~\n#", max_size=8), max_size=3))
def test_any_text_can_be_given_and_saved(texts):
    (override,) = parse([f"launch.slurm.setup=[{','.join(map(quoted, texts))}]"])
    assert OmegaConf.to_container(OmegaConf.create(override.value()), resolve=True) == texts
    recipe = Recipe()
    recipe.launch.slurm.setup = texts
    assert OmegaConf.to_container(OmegaConf.create(read_yaml(StringIO(resolved_yaml(recipe)))), resolve=True) == as_dict(recipe)


def test_an_interpolation_is_resolved_and_an_escaped_one_is_text(tmp_path):
    recipe = compose(["run.name=a-${run.seed}", 'launch.slurm.setup=["echo \\${HOME}"]', f"run.dir={tmp_path}"])
    assert recipe.run.name == "a-0"
    assert recipe.launch.slurm.setup == ["echo ${HOME}"]
    assert load_recipe(save_recipe(recipe)) == recipe


def test_null_is_nothing_only_where_a_key_can_be_left_out():
    recipe = compose(["data.cache=null", "launch.slurm.account=null", "run.name=null"])
    assert (recipe.data.cache, recipe.launch.slurm.account, recipe.run.name) == (None, None, "null")
    assert compose(['data.cache="null"']).data.cache == "null"


def test_faults_take_text_as_typed():
    faults = compose(["faults=[kill@step=7:rank=2, corrupt@step=9]"]).faults
    assert [fault.split("@")[0] for fault in faults] == ["kill", "corrupt"]


def test_numbers_and_switches_are_what_they_were():
    recipe = compose(
        ["train.steps=1_000", "optim.lr=1e-4", "checkpoint.async=FALSE", "parallel.balance=[3,1]", "optim.betas=[.8,0.9]"]
    )
    assert (recipe.train.steps, recipe.optim.lr, recipe.checkpoint.asynchronous) == (1000, 1e-4, False)
    assert (recipe.parallel.balance, recipe.optim.betas) == ([3, 1], [0.8, 0.9])
    assert compose(["train.steps=int(3.9)", "run.seed=${train.steps}"]).run.seed == 3


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("train.steps=八", "train.steps takes an integer, not '八'"),
        ("run.nam=é", "did you mean run.name?"),
        ("run.name='tis", "quote a value"),
        ("run.name=a,", "quote a value"),
        ('run.name="a"b', "quote a value"),
        ("run.name=${", r"\${"),
        ("run.name=${HOME}", r"write \${ in a text"),
        ("run.name=???", "give that key a value"),
        ("run.name=\udcff", "UTF-8"),
        ("run.name=[a]", "takes text"),
        ("faults={a: 1,", "quote a value"),
        ("optim.betas=[range(1", "quote a value"),
        ("run={name: x", "quote a value"),
        ("launch.slurm.setup=[a", "quote a value"),
        ('launch.slurm.setup=[export A="x, y", b]', "quote a value"),
        ('run.name=say "a, b"', "quote a value"),
    ],
)
def test_what_cannot_be_read_is_refused_in_one_line(override, said):
    with pytest.raises(RecipeError) as caught:
        compose([override])
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"run: {name: caf\xe9}\n", "mine.yaml is not UTF-8 text (byte 65)"),
        (b"run: &a {name: *a}\n", "mine.yaml has an alias that stands for itself"),
        (b"run: {name: }\n", "'None' for field of type 'str'"),
        (b"run: {name: 1, name: 2}\n", "mine.yaml, line 5: found duplicate key name"),
        (b"launch: {slurm: {setup: 007}}\n", "not a ListConfig, list or tuple"),
    ],
)
def test_a_recipe_file_that_cannot_be_read_is_refused_in_one_line(tmp_path, content, said):
    (tmp_path / "recipe").mkdir()
    (tmp_path / "recipe" / "mine.yaml").write_bytes(b"# @package _global_\ndefaults:\n  - tiny\n  - _self_\n" + content)
    with pytest.raises(RecipeError) as caught:
        compose([f"hydra.searchpath=[{tmp_path}]", "recipe=mine"])
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_recipe_file_with_a_byte_order_mark_is_named(tmp_path):
    (tmp_path / "recipe").mkdir()
    (tmp_path / "recipe" / "mine.yaml").write_text("# @package _global_\n", encoding="utf-8-sig")
    with pytest.raises(RecipeError, match=r"mine\.yaml begins with a byte order mark, .* save it without"):
        compose([f"hydra.searchpath=[{tmp_path}]", "recipe=mine"])


@pytest.fixture
def own_recipe(tmp_path):
    """own_recipe(text of a file, group) -> the recipe that it makes, alone and beside `tiny`."""

    def composed(text, group="recipe", header="# @package _global_\ndefaults:\n  - tiny\n  - _self_\n", name="mine"):
        (tmp_path / group).mkdir(exist_ok=True)
        (tmp_path / group / f"{name}.yaml").write_text(header + text, encoding="utf-8")
        return compose([f"hydra.searchpath=[{quoted(str(tmp_path))}]", f"{group}={name}"])

    return composed


@pytest.mark.parametrize("text", ["2024_01_01", "2024-01-01", "1e3", "yes", "12:30:00", "null", "3.10", "八卦炉", "~"])
def test_text_is_kept_in_recipe_files(own_recipe, text):
    recipe = own_recipe(f"run:\n  name: {text}\nlaunch:\n  slurm: {{setup: [{text}, {text}]}}\n")
    assert (recipe.run.name, recipe.launch.slurm.setup) == (text, [text, text])
    recipe = own_recipe(f"source: ./{text}\ncache: {text}\nvalidation_fraction: 1e-1\n", "data", "")
    assert (recipe.data.source, recipe.data.validation_fraction) == (f"./{text}", 0.1)
    assert recipe.data.cache == (None if text in ("null", "~") else text)


def test_aliases_and_merges_of_a_recipe_file_serve_text_and_numbers(own_recipe):
    recipe = own_recipe("run: {seed: &it 010, name: *it}\ntrain: &more {dtype: float64}\nlaunch: {slurm: {<<: {account: 1e3}}}\n")
    assert (recipe.run.seed, recipe.run.name, recipe.launch.slurm.account) == (8, "010", "1e3")


def test_a_recipe_may_be_named_like_a_number(own_recipe):
    assert own_recipe("train: {steps: 3}\n", name="2024_01").train.steps == 3
    assert own_recipe("train: {steps: 4}\n", name="八卦").train.steps == 4
    assert own_recipe("", header="# @package _global_\ndefaults:\n  - 2024_01\n  - _self_\n", name="other").train.steps == 3


def test_a_config_edited_by_hand_keeps_its_text(tmp_path):
    text = resolved_yaml(compose([]))
    (tmp_path / "config.yaml").write_text(
        text.replace("name: tiny\n", "name: 2024_01_01\n").replace("time: null", "time: 12:30:00")
    )
    recipe = load_recipe(tmp_path / "config.yaml")
    assert (recipe.run.name, recipe.launch.slurm.time) == ("2024_01_01", "12:30:00")


def test_the_recipes_of_the_page_are_composed(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    page = (Path(__file__).parents[2] / "docs/guides/recipes.md").read_text(encoding="utf-8")
    file = page[page.index("    # @package") :]
    file = file[: file.index("\n\n") + 1]
    (tmp_path / "recipes/recipe").mkdir(parents=True)
    (tmp_path / "recipes/recipe/mine.yaml").write_text("".join(line[4:] for line in file.splitlines(keepends=True)))
    commands = [shlex.split(line)[2:] for line in page.splitlines() if line.startswith("    bagualu train ")]
    dated, quoted_source, own, resumed, changed, swept = commands
    assert compose(dated).run.name == "2024_01_01"
    assert compose(dated).launch.slurm.setup == ["module load cuda", "echo 007"]
    assert (compose(quoted_source).data.source, compose(quoted_source).run.name) == ("texts/a, b", "八卦炉")
    assert (compose(own).run.name, compose(own).train.steps) == ("2024_01_01", 50)
    assert resumed == changed[:2] == ["run.dir=runs/tiny", "checkpoint.resume=true"]
    assert swept[0] == "-m"
    assert [override.is_sweep_override() for override in parse(swept[1:])] == [False, True, True]

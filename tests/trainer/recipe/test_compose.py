"""Composition: what the recipes say, and that whatever cannot be composed is refused in one line with the fix."""

import pwd

import pytest

from bagualu.comm.errors import RecipeError
from bagualu.trainer.recipe.compose import as_dict, compose, load_recipe, parse, resolved_yaml, save_recipe
from bagualu.trainer.recipe.config import Recipe
from bagualu.trainer.recipe.keys import check_override, keys, options


@pytest.mark.parametrize(
    "name", [name for name in options("recipe") if name != "finetune"]
)  # tests/trainer/conversion/test_lora.py
def test_every_recipe_is_valid_for_the_world_it_asks_for_and_bears_its_name(name):
    recipe = compose([f"recipe={name}"])
    recipe.validate(recipe.world_size())
    assert recipe.run.name == name
    assert recipe.run.dir == f"runs/{name}"


def test_without_overrides_it_is_the_main_job():
    recipe = compose([])
    assert (recipe.run.name, recipe.world_size()) == ("tiny", 4)
    assert str(recipe.validate(4)) == "data 2 x pipeline 2 x expert 2"


@pytest.mark.parametrize(
    ("name", "model", "data", "dtype"),
    [
        ("bench_dense", (8, 512, 8, 1344, 8192), (256, 8), "bfloat16"),
        ("bench_dense_124m", (12, 768, 12, 2048, 32000), (512, 4), "bfloat16"),
        ("llama3_8b", (32, 4096, 32, 14336, 128256), (8192, 512), "bfloat16"),
    ],
)
def test_the_yardsticks_are_what_they_are_known_as(name, model, data, dtype):
    recipe = compose([f"recipe={name}"])
    m = recipe.model
    assert (m.layers, m.hidden, m.heads, m.ffn, m.vocab) == model
    assert (recipe.data.sequence_length, recipe.data.global_batch) == data
    assert recipe.train.dtype == dtype


def test_the_mixture_yardstick():
    moe = compose(["recipe=bench_moe"]).model.moe
    assert (moe.experts, moe.top_k, moe.ffn) == (8, 2, 704)


@pytest.mark.parametrize(
    "overrides",
    [["recipe=llama3_8b", "launch.nodes=16"], ["recipe=moe_tiny", "parallel.tensor=2", "launch.workers=8"]],
)
def test_the_commands_of_the_design_are_valid(overrides):
    recipe = compose(overrides)
    world = 128 if recipe.launch.nodes == 16 else 8
    recipe.validate(world)


def test_values_of_every_kind_arrive_as_they_were_meant():
    recipe = compose(["parallel.balance=[3,1]", "optim.betas=[0.8,0.9]", "parallel.data=null", "model=tiny_dense",
                      "launch.slurm.setup=[\"module load a, b\"]", "run.name=it", "train.steps=7"])  # fmt: skip
    assert recipe.parallel.balance == [3, 1]
    assert recipe.optim.betas == [0.8, 0.9]
    assert recipe.parallel.data is None
    assert recipe.model.moe.experts == 0
    assert recipe.launch.slurm.setup == ["module load a, b"]
    assert recipe.run.dir == "runs/it"
    assert recipe.train.steps == 7


WRONG = [
    ("parallel.tensr=2", "did you mean parallel.tensor?"),
    ("tensor=2", "did you mean parallel.tensor?"),
    ("model.experts=4", "did you mean model.moe.experts?"),
    ("lr=1", "did you mean optim.lr?"),
    ("batch=4", "data.global_batch or train.micro_batch"),
    ("zzz=1", "--cfg job"),
    ("+extra.key=1", "unknown key extra.key"),
    ("~model.layers", "cannot remove"),
    ("train.steps=abc", "train.steps takes an integer, not 'abc', e.g. train.steps=100"),
    ("train.steps=10.7", "an integer, not 10.7"),
    ("train.steps=null", "an integer, not null"),
    ("checkpoint.resume=null", "true or false, not null"),
    ("train.steps={a: 1}", "train.steps takes an integer, not {a: 1}, e.g. train.steps=100"),
    ("faults={a: b}", "faults takes text or a list, not {a: b}"),
    ("optim={nme: sgd}", "give the keys one by one"),
    *(
        (f"train.offload_bytes={given}", f"not {shown}, e.g. train.offload_bytes=1073741824")
        for given, shown in [("10GB", "'10GB'"), ("null", "null"), ("true", "true"), ("1e9", "1e9")]
    ),
    ("parallel.data=x", "an integer or null"),
    ("optim.lr=fast", "a number, not 'fast'"),
    ("optim.lr=nan", "finite"),
    ("optim.betas=0.9", "optim.betas=[0.9,0.95]"),
    ("checkpoint.resume=maybe", "true or false"),
    ("launch.affinity=2", "true or false"),
    ("checkpoint.async=2", "checkpoint.async takes true or false"),
    ("checkpoint.asynchronous=true", "did you mean checkpoint.async?"),
    ("checkpoint.asnyc=true", "did you mean checkpoint.async?"),
    ("optim=3", "optim.name, optim.lr"),
    ("model.moe={expert:3}", "expert"),
    ("recipe=tinny", "did you mean recipe=tiny?"),
    ("recipe=gpt9", "bench_dense, bench_dense_124m"),
    ("model=nothing", "tiny_moe"),
    ("optim.lr=1e-3,3e-4", "optim.lr=1e-3,3e-4 gives several values; one run takes one value of each key; `bagualu train -m`"),
    ("train.steps", "give key=value"),
    ("a=b=c,(", "unknown key a"),
    ("optim.betas=[0.8,(", "give key=value"),
    ("~model", "cannot remove"),
    ("run.name=${oops}", "oops"),
    ("train.steps=${run.name}", "Integer"),
    ("hydra.run.dir=x", "hydra.searchpath"),
    ("hydra.searchpath=recipes", "give hydra.searchpath=[recipes]"),
    ("hydra.searchpath=[/no/such/folder]", "/no/such/folder is not a folder"),
]


@pytest.mark.parametrize(("override", "fix"), WRONG)
def test_what_cannot_be_composed_is_refused_in_one_line_with_the_fix(override, fix):
    with pytest.raises(RecipeError) as caught:
        compose([override])
    assert fix in str(caught.value)
    assert "\n" not in str(caught.value)


def test_recipes_of_ones_own_are_found_and_checked_alike(tmp_path):
    (tmp_path / "recipe").mkdir()
    start = "# @package _global_\ndefaults:\n  - tiny\n  - _self_\n"
    (tmp_path / "recipe" / "mine.yaml").write_text(start + "train:\n  steps: 3\n")
    (tmp_path / "recipe" / "typo.yaml").write_text(start + "train:\n  stps: 3\n")
    (tmp_path / "recipe" / "broken.yaml").write_text("train: [\n")
    path = f"hydra.searchpath=[file://{tmp_path}]"
    assert compose([path, "recipe=mine"]).train.steps == 3
    for name, said in (("typo", "stps"), ("broken", "broken.yaml"), ("absent", "recipe/absent")):
        with pytest.raises(RecipeError) as caught:
            compose([path, f"recipe={name}"])
        assert said in str(caught.value)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("recompute", "meant"), [("[0,2]", [0, 2]), ("every:2", "every:2"), ("bytes:1000", "bytes:1000"), ("none", "none")]
)
def test_a_saved_recipe_is_read_back_as_it_was(tmp_path, recompute, meant):
    recipe = compose(["parallel.balance=[3,1]", f"run.dir={tmp_path}/deep/run", f"train.recompute={recompute}"])
    assert load_recipe(save_recipe(recipe)) == recipe
    assert recipe.train.recompute == meant
    assert "balance:\n  - 3\n  - 1\n" in resolved_yaml(recipe)
    assert as_dict(recipe)["parallel"]["balance"] == [3, 1]


@pytest.mark.parametrize("text", ["model: {layers: many}", "unknown: 1", "{", "- 1"])
def test_a_config_that_is_none_is_refused_in_one_line(tmp_path, text):
    (tmp_path / "config.yaml").write_text(text)
    with pytest.raises(RecipeError, match=r"run\.dir") as caught:
        load_recipe(tmp_path / "config.yaml")
    assert "\n" not in str(caught.value)


def test_a_key_that_is_no_name_in_python_is_the_same_everywhere(tmp_path):
    """checkpoint.async: typed, in a recipe of one's own, in config.yaml and with --json."""
    recipe = compose(["checkpoint.async=false", f"run.dir={tmp_path}"])
    assert recipe.checkpoint.asynchronous is False
    assert compose(["checkpoint={async:false}"]).checkpoint.asynchronous is False
    assert compose([]).checkpoint.asynchronous is True
    assert as_dict(recipe)["checkpoint"]["async"] is False
    assert "  async: false\n" in save_recipe(recipe).read_text()
    assert load_recipe(tmp_path / "config.yaml") == recipe
    (tmp_path / "recipe").mkdir()
    start = "# @package _global_\ndefaults:\n  - tiny\n  - _self_\n"
    (tmp_path / "recipe" / "mine.yaml").write_text(start + "checkpoint:\n  async: false\n")
    assert compose([f"hydra.searchpath=[file://{tmp_path}]", "recipe=mine"]).checkpoint.asynchronous is False


def test_a_run_directory_that_cannot_be_written_is_refused_in_a_line(tmp_path):
    recipe = compose(["recipe=tiny", f"run.dir={tmp_path}"])
    (tmp_path / "config.yaml" / "x").mkdir(parents=True)
    with pytest.raises(RecipeError, match=rf"run\.dir={tmp_path} cannot be written \(.*\); make room there or give another"):
        save_recipe(recipe)
    assert [path.name for path in tmp_path.iterdir()] == ["config.yaml"]


def test_keys_are_those_of_the_dataclasses():
    assert keys()["model.moe.experts"] is int
    assert set(as_dict(Recipe())) == {key.split(".")[0] for key in keys()}


def test_a_cluster_is_a_key_although_recipes_have_a_folder_of_that_name(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert compose(["cluster=h100"]).cluster == "h100"
    assert compose(["cluster=a100", "cluster=null"]).cluster is None
    assert compose(["cluster='~/my.yaml'"]).cluster == f"{tmp_path}/my.yaml"
    recipe = compose(["cluster=h100", f"run.dir={tmp_path}"])
    assert load_recipe(save_recipe(recipe)) == recipe


def test_a_value_is_not_judged_by_what_was_given_before():
    """A sweep composes several recipes in one process."""
    for override in parse([f"parallel.balance={value}" for value in ("[3,5]", "{a:1}", "[3,5]", "measured")]):
        check_override(override)


def test_the_home_directory_is_spelt_out_in_every_path(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    recipe = compose(["run.dir=~/run", "data.source='~/text'", "data.cache=~"])
    assert (recipe.run.dir, recipe.data.source, recipe.data.cache) == (f"{tmp_path}/run", f"{tmp_path}/text", str(tmp_path))
    assert load_recipe(save_recipe(recipe)) == recipe
    assert compose(["run.name=~/x", "run.dir=runs/~/x"]).run.name == "~/x"
    assert compose(["run.dir=runs/~/x"]).run.dir == "runs/~/x"
    assert compose(["run.name=it", "run.dir=~/${run.name}"]).run.dir == f"{tmp_path}/it"
    someone = pwd.getpwuid(0)
    assert compose([f"run.dir=~{someone.pw_name}/run"]).run.dir == f"{someone.pw_dir}/run"
    (tmp_path / "recipe").mkdir()
    start = "# @package _global_\ndefaults:\n  - tiny\n  - _self_\n"
    (tmp_path / "recipe" / "mine.yaml").write_text(start + "data: {cache: ~/cache}\n")
    for searched in ("~", "file://~"):
        assert compose([f"hydra.searchpath=[{searched}]", "recipe=mine"]).data.cache == f"{tmp_path}/cache"


@pytest.mark.parametrize("key", ["run.dir", "data.source", "data.cache"])
def test_a_home_directory_of_nobody_is_refused(key):
    recipe = compose([f"{key}=~nobody_of_this_name/x"])
    with pytest.raises(RecipeError, match=rf"{key}=./~nobody_of_this_name/x for a folder of that name"):
        recipe.validate(4)


def test_a_run_whose_recipe_names_its_home_directory_by_a_tilde_is_the_same_run(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    path = save_recipe(compose(["run.dir=~/run", "data.source=~/text"]))
    path.write_text(path.read_text().replace(f"source: {tmp_path}", "source: ~"))
    assert "source: ~/text" in path.read_text()
    assert load_recipe(path).data.source == f"{tmp_path}/text"


def a_run(folder, *overrides):
    save_recipe(compose([f"run.dir={folder}", *overrides]))
    return f"run.dir={folder}"


RESUME = "checkpoint.resume=true"


def test_a_run_that_is_resumed_without_a_recipe_keeps_its_own(tmp_path):
    given = ["recipe=tiny_dense", "optim.lr=0.007", "parallel.balance=[3,1]", "parallel.pipeline=2", "run.name=a ${b}"]
    run = a_run(tmp_path / "run", *(word.replace("$", "\\$") for word in given), "data.cache=~/c")
    then, now = load_recipe(tmp_path / "run/config.yaml"), compose([run, RESUME])
    assert (now.run.name, now.optim.lr, now.parallel.balance, now.model.moe.experts) == ("a ${b}", 0.007, [3, 1], 0)
    then.checkpoint.resume = True
    assert as_dict(now) == as_dict(then)
    now = compose([run, RESUME, "train.steps=7", "parallel.pipeline=1", "parallel.balance=uniform"])
    assert (now.train.steps, now.parallel.pipeline, now.optim.lr) == (7, 1, 0.007)


@pytest.mark.parametrize("words", [["recipe=moe_tiny", RESUME], ["model=tiny_moe", RESUME], [], ["checkpoint.resume=false"]])
def test_a_recipe_that_is_named_or_a_run_that_begins_takes_nothing_from_an_earlier_run(tmp_path, words):
    run = a_run(tmp_path / "run", "recipe=tiny_dense", "optim.lr=0.007")
    recipe = compose([run, *words])
    assert (recipe.optim.lr, recipe.model.moe.experts) == (0.003, 4)


@pytest.mark.parametrize(("began", "now"), [("gloo", "auto"), ("nccl", "auto"), ("simulated", "simulated")])
def test_a_resumed_run_chooses_its_backend_as_if_its_recipe_were_typed_again(tmp_path, began, now):
    """Its config.yaml has the backend that took the place of auto, on a machine that had GPUs or had none."""
    assert compose([a_run(tmp_path / "run", f"comm.backend={began}"), RESUME]).comm.backend == now


def test_a_run_that_has_not_begun_takes_the_recipe_that_is_named_by_default(tmp_path):
    assert compose([f"run.dir={tmp_path}/run", RESUME]).run.name == "tiny"


def test_a_run_whose_recipe_cannot_be_read_is_not_resumed_with_another(tmp_path):
    run = a_run(tmp_path / "run", "recipe=tiny_dense")
    (tmp_path / "run/config.yaml").write_text("model: {depth: 3}")
    with pytest.raises(RecipeError, match=r"config\.yaml is not a recipe this version can read"):
        compose([run, RESUME])

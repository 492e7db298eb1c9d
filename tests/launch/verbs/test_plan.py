"""`bagualu plan`: its command is that of the layout it names, and its JSON and text say why others lose."""

import json
import re
import shlex
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from bagualu.comm.cluster_file import load_cluster
from bagualu.launch.cli import main
from bagualu.launch.verbs import plan as verb
from bagualu.launch.verbs.plan_command import command, layout_keys, machine_keys
from bagualu.trainer.recipe.changed import changed, value_of
from bagualu.trainer.recipe.compose import compose
from bagualu.trainer.simulation import planning
from bagualu.trainer.simulation.failures import FailureQuestion, run_length

GUIDE = (Path(__file__).parents[3] / "docs/guides/planning.md").read_text()
COMMANDS = [line.strip() for line in GUIDE.splitlines() if line.startswith("    bagualu plan ")]
SMALL = ["model.layers=40", "model.hidden=64", "model.heads=8", "model.kv_heads=8", "model.ffn=64", "model.vocab=512",
         "data.sequence_length=32", "train.micro_batch=1", "parallel.tensor=8", "parallel.zero=1", "seconds=5"]  # fmt: skip
"""Makes the commands of the guide take little time; tests/test_architecture.py checks them as they are."""
WORDS = [
    *("recipe=tiny_dense", "model.layers=8", "model.hidden=1024", "model.heads=8", "model.kv_heads=8", "model.ffn=4096"),
    *("data.source=random", "data.sequence_length=2048", "data.global_batch=32", "train.dtype=bfloat16"),
]
KEPT = ["parallel.sequence=false", "train.micro_batch=1", "parallel.zero=1"]
VALUES = {
    "parallel.data": 4, "parallel.tensor": 2, "parallel.pipeline": 2, "parallel.expert": 1, "train.micro_batch": 2,
    "parallel.sequence": True, "parallel.schedule": "zb_v", "parallel.virtual_stages": None, "train.recompute": "every:2",
    "parallel.zero": 2, "parallel.balance": [1, 2, 2, 3], "parallel.shares": None,
}  # fmt: skip


@pytest.fixture
def hurried(monkeypatch):
    """The clock by which a search ends runs five times as fast: its shortest time, seconds=5, is over in one."""
    monkeypatch.setattr(verb, "time", SimpleNamespace(perf_counter=lambda: 5 * time.perf_counter()))


@pytest.fixture(scope="module")
def searched():
    """A search that has been made in this module already is not made again: the same layouts are printed in several ways."""
    known, search = {}, planning.find_layouts

    def once(recipe, cluster, world, given, effort, now, shares):
        asked = repr((recipe, cluster, world, given, effort, shares))
        if asked not in known:
            known[asked] = search(recipe, cluster, world, given, effort, now, shares)
        return known[asked]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(planning, "find_layouts", once)
        yield


def composed(line):
    """The verb and the recipe of a command."""
    program, verb, *words = shlex.split(line)
    assert program == "bagualu"
    return verb, compose(words)


@pytest.mark.parametrize("words", [WORDS, [*WORDS, "parallel.tensor=2", "parallel.data=16"], ["recipe=llama3_8b"]])
def test_the_command_sets_what_was_planned(words):
    recipe, given = compose(words), [word.partition("=")[0] for word in words]
    layout = layout_keys(recipe, VALUES)
    kept = {key: value for key, value in layout.items() if key not in given or value != value_of(recipe, key)}
    line = command(words, kept, 1)
    assert composed(line) == ("train", changed(recipe, VALUES))
    assert {key: value_of(composed(line)[1], key) for key in layout} == layout


def test_keys_that_have_no_effect_are_left_out():
    layout = layout_keys(
        compose(WORDS), VALUES | {"parallel.pipeline": 1, "parallel.schedule": "1f1b", "parallel.balance": "uniform"}
    )
    assert not {"parallel.schedule", "parallel.expert", "parallel.virtual_stages", "parallel.shares"} & layout.keys()


def test_speeds_of_another_layout_are_removed():
    recipe = compose([*WORDS, "parallel.pipeline=2", "parallel.balance=analytic", "parallel.speeds=[1.0,0.5]"])
    assert layout_keys(recipe, VALUES)["parallel.speeds"] is None


@pytest.mark.parametrize(
    ("words", "cluster", "world", "verb", "workers", "nodes"),
    [
        (["recipe=llama3_8b"], "h100", 512, "slurm", 8, 64),
        (["recipe=llama3_8b"], "h100", 4, "train", 4, 1),
        (["recipe=llama3_8b"], "gb200", 72, "slurm", 4, 18),
        (["recipe=llama3_8b", "launch.workers=2"], "h100", 16, "slurm", 2, 8),
        (["recipe=tiny_dense"], "h100", 8, "train", None, 1),
        (["recipe=tiny_dense"], "sw26010pro", 6, "slurm", None, 6),
    ],
)
def test_ranks_start_on_the_machines_of_the_cluster(words, cluster, world, verb, workers, nodes):
    recipe, given = compose(words), [word.partition("=")[0] for word in words]
    machines = machine_keys(recipe, given, load_cluster(cluster).for_world(world), world)
    line = command(
        words, {"parallel.data": world, "parallel.tensor": 1} | machines, machines.get("launch.nodes", recipe.launch.nodes)
    )
    found, planned = composed(line)
    assert (found, planned.launch.workers, planned.launch.nodes) == (verb, workers, nodes)
    assert planned.world_size() == world
    assert planned.launch.slurm.gpus_per_node in (None, workers)


@pytest.mark.usefixtures("hurried")
@pytest.mark.parametrize("line", COMMANDS[1:])
def test_the_commands_of_the_guide_plan(capsys, line):
    words = shlex.split(line)[2:]
    own = [word.partition("=")[0] for word in words]
    code, printed = run(capsys, *words, *(word for word in SMALL if word.partition("=")[0] not in own))
    assert code == 0
    assert len([line for line in printed.out.splitlines() if line.startswith("  bagualu ")]) == 1


@pytest.mark.usefixtures("hurried")
def test_the_guide_leads_from_two_weeks_to_a_command_that_ends_in_time(capsys, tmp_path, monkeypatch):
    """The command that the first plan of the guide prints is one that slurm takes and simulate predicts to end in time."""
    monkeypatch.chdir(tmp_path)
    words = [*shlex.split(COMMANDS[0])[2:], *SMALL]
    assert {"world=512", "cluster=h100", "days=14"} <= set(words)
    code, printed = run(capsys, *words, "--json")
    assert code == 0
    found = json.loads(printed.out)
    line, length = found["plans"][0]["command"], found["run"]
    planned = composed(line)[1]
    assert planned.train.steps == length["steps"]
    assert (planned.checkpoint.every, planned.restart.limit) == (length["checkpoint_steps"], length["restart_limit"])
    assert length["tokens"] == planned.train.steps * planned.data.global_batch * planned.data.sequence_length
    assert 0.9 * 14 * 86400 < planned.train.steps * found["plans"][0]["step_seconds"] < 14 * 86400
    assert planned.world_size() == 512
    assert main([*shlex.split(line)[1:], "--print"]) == 0
    assert "--nodes=64" in capsys.readouterr().out
    kept = [word for word in shlex.split(line)[2:] if not word.startswith("launch.")]
    assert main(["simulate", *kept, "cluster=h100", "world=512", "days=14", "--json"]) == 0
    again = json.loads(capsys.readouterr().out)
    assert again["step_seconds"] == pytest.approx(found["plans"][0]["step_seconds"])
    assert again["failures"]["failures"]["high"] <= planned.restart.limit


def test_the_last_command_of_the_guide_has_the_steps_that_fit():
    """Into 14 days, at the step that the guide shows for the layout of the recipe."""
    (step,) = re.findall(r"^    step +([\d.]+) s for", GUIDE, re.MULTILINE)
    (line,) = [line.strip() for line in GUIDE.splitlines() if line.startswith("    bagualu slurm ")]
    recipe = compose([word for word in shlex.split(line)[2:] if word != "--print"])
    cluster = load_cluster("h100").for_world(512)
    length = run_length(recipe, cluster, recipe.validate(512), float(step), FailureQuestion(days=14))
    assert 0.98 * length.steps < recipe.train.steps <= length.steps
    assert 0.8 * length.checkpoint_steps < recipe.checkpoint.every <= length.checkpoint_steps
    assert recipe.restart.limit >= length.restart_limit
    assert f"{14 * 86400 / float(step):,.0f} such steps" in GUIDE
    assert f"{recipe.train.steps * recipe.data.global_batch * recipe.data.sequence_length:.2e}".replace("e+", "e") in GUIDE


def run(capsys, *words):
    code = main(["plan", *words])
    return code, capsys.readouterr()


@pytest.mark.usefixtures("searched")
def test_the_plans_come_best_first_with_the_command_of_each(capsys):
    code, printed = run(capsys, *WORDS, *KEPT, "cluster=h100", "world=8", "top=3", "--json")
    assert code == 0
    found = json.loads(printed.out)
    plans = found["plans"]
    assert 1 <= len(plans) <= 3
    seconds = [plan["step_seconds"] for plan in plans]
    assert seconds == sorted(seconds)
    for plan in plans:
        verb, recipe = composed(plan["command"])
        assert verb == "train"
        recipe.validate(8)
        assert {key: value_of(recipe, key) for key in plan["layout"]} == plan["layout"]
        assert plan["layout"].keys() >= {"parallel.data", "parallel.tensor", "parallel.pipeline", "train.micro_batch"}
        assert plan["memory_bytes"] > 0
        assert sum(plan["parts"].values()) == pytest.approx(plan["step_seconds"])
        assert 0 < plan["mfu"] < 1
    assert plans[0]["slower_because"] == {}
    assert found["others"]
    for other in found["others"]:
        keys = [word.partition("=")[0] for word in other["choice"].split()]
        assert all(other["layout"].get(key) != plans[0]["layout"].get(key) for key in keys)
        assert other["fits"] or other["excess_bytes"] > 0
    slower = [other for other in found["others"] if other["fits"] and other["slower"] > 0.02]
    assert slower
    assert all(other["slower_because"] for other in slower)


@pytest.mark.usefixtures("searched")
def test_the_table_names_the_winner_and_why_others_lose(capsys, tmp_path):
    """Also on a cluster that was measured quickly, which is said."""
    shipped = (Path(__file__).parents[3] / "recipes/cluster/h100.yaml").read_text()
    (tmp_path / "mine.yaml").write_text(f"quick: true\n{shipped}")
    code, printed = run(capsys, *WORDS, *KEPT, "parallel.tensor=1", f"cluster={tmp_path}/mine.yaml", "world=8", "top=2")
    assert code == 0
    assert "figures: of mine.yaml come from a quick measurement" in printed.out
    lines = printed.out.splitlines()
    (line,) = [line.strip() for line in lines if line.startswith("  bagualu ")]
    composed(line)[1].validate(8)
    assert any("train.recompute=full" in line and "matrix products +" in line for line in lines)


@pytest.mark.usefixtures("searched")
def test_every_word_of_the_text_is_explained(capsys):
    code, printed = run(capsys, *WORDS, *KEPT, "cluster=h100", "world=8", "top=3")
    assert code == 0
    lines = printed.out.splitlines()
    parts = {part for line in lines for part in re.findall(r"(?:^|  |, )([a-z][a-z ]*?) \+[\d.e-]+ s", line)}
    assert parts
    assert {part for part in parts if not any(line.startswith(f"  {part} ") for line in lines)} == set()
    for word in ("MFU: ", "memory: ", "zero: ", "because of: "):
        assert word in printed.out
    assert "figures: " not in printed.out
    assert ("about: " in printed.out) == any(re.search(r"  about \+", line) for line in lines)
    assert max(map(len, lines[-len(parts) - 4 :])) <= 132


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["world=8"], "plan needs cluster="),
        (["cluster=h100"], "plan needs world="),
        (["cluster=h10", "world=8"], "did you mean cluster=h100?"),
        (["cluster=h100", "world=eight"], "world=eight must be a whole number"),
        (["cluster=h100", "world=8", "seconds=1"], "give seconds=5 or more"),
        (["cluster=h100", "world=8", "loads=skewed:2"], "has no effect on a model without experts"),
        (["cluster=h100", "world=29"], "give world=28"),
        (["cluster=mixed_h100_a100", "world=24"], "give a multiple of 16"),
        (["cluster=h100", "world=8", "days=never"], "days=never must be a number above 0"),
    ],
)
def test_wrong_words_are_refused(capsys, words, says):
    code, printed = run(capsys, *WORDS, *words)
    assert code == 2
    (line,) = printed.err.splitlines()
    assert says in line


@pytest.mark.parametrize(("line", "says"), [("  launch_seconds: 3.8e-06", "missing"), ("  context_bytes: -1", "above 0")])
def test_a_cluster_file_with_a_missing_or_negative_figure_is_refused(tmp_path, capsys, line, says):
    from importlib.resources import files

    text = (files("bagualu.recipes") / "cluster" / "h100.yaml").read_text()
    key = line.partition(":")[0]
    lines = [line if old.startswith(key) else old for old in text.splitlines()]
    path = tmp_path / "mine.yaml"
    path.write_text("\n".join([old for old in lines if says != "missing" or not old.startswith(key)]))
    code, printed = run(capsys, *WORDS, f"cluster={path}", "world=8")
    assert code == 2
    (refusal,) = printed.err.splitlines()
    assert says in refusal
    assert key.strip() in refusal

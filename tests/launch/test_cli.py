"""The command line: help, exit codes, one line for what is wrong, one JSON document for --json; no worker is started."""

import json
import re
import socket

import pytest

from bagualu.comm.errors import RecipeError
from bagualu.fault_tolerance.checkpoint.saving.fence import EPOCH
from bagualu.launch import cli
from bagualu.launch.verbs.usage import VERBS
from bagualu.trainer.recipe import preflight
from bagualu.trainer.recipe.compose import compose, require_resumed_run, save_recipe


def refused(capsys, *words):
    """The one line on stderr with which these words are refused."""
    assert cli.main([*words]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert len(err.splitlines()) == 1
    assert err.startswith("bagualu: error: ")
    return err


WITH_PAGES = ("train", "schedule", "generate", "evaluate")


@pytest.mark.parametrize("words", [[], ["--help"], ["slurm", "-h", "recipe=tiny"], *([verb, "--help"] for verb in WITH_PAGES)])
def test_help_comes_on_stdout(capsys, words):
    assert cli.main(words) == 0
    out, err = capsys.readouterr()
    assert err == ""
    assert len(out.splitlines()) < 45
    assert max(map(len, out.splitlines())) <= 118
    assert all(verb in out for verb in words[:1])


def test_help_lists_every_verb_and_every_recipe(capsys):
    cli.main(["--help"])
    assert "train" in (out := capsys.readouterr().out)
    assert "slurm" in out
    cli.main(["train", "--help"])
    out = capsys.readouterr().out
    for name in ("tiny", "tiny_dense", "moe_tiny", "bench_dense", "bench_dense_124m", "bench_moe", "llama3_8b"):
        assert f"  {name} " in out


@pytest.mark.parametrize(
    ("words", "fix"),
    [
        (["trian"], "did you mean bagualu train?"),
        (["recipe=tiny"], f"there are {', '.join(VERBS)}"),
        (["checkpoint"], "bagualu checkpoint list runs/tiny"),
        (["checkpoint", "list", "/no/such/run"], "/no/such/run/checkpoints does not exist"),
        (["train", "--frobnicate"], "bagualu train --help"),
        (["train", "--cfg"], "--cfg job"),
        (["train", "--print"], "unknown option --print"),
        (["slurm", "-m"], "unknown option -m: one job takes one value of each key; submit a job for each"),
        (["slurm", "-m", "optim.lr=1e-3,3e-3"], "`bagualu train -m`"),
        (["slurm", "optim.lr=1e-3,3e-3"], "one job takes one value of each key; submit a job for each, or run one after the other"),
        (["slurm", "--cfg", "job", "optim.lr=1e-3,3e-3"], "one job takes one value"),
        (["slurm", "run.name=a,b"], "or quote a value that holds a comma: 'run.name=\"a, b\"'"),
        (["rehearse", "-m"], "one rehearsal takes one value of each key; rehearse each value by itself"),
        (["rehearse", "optim.lr=1,2", "faults=[kill@step=3]"], "one rehearsal takes one value"),
        (["rehearse", "launch.nodes=2", "faults=[kill@step=3]"], "a rehearsal runs on this machine only; give launch.nodes=1"),
        (["schedule", "-m"], "one schedule takes one value of each key"),
        (["schedule", "name=zb_v", "stages=2,4", "micro_batches=8"], "draw each by itself, e.g. stages=2"),
        (["schedule", "parallel.pipeline=4"], "did you mean stages?"),
        (["schedule", "--stages=4"], "give stages=4"),
        (["checkpoint", "-m"], "looks at one run"),
        (["checkpoint", "list", "--cfg", "job"], "an option of bagualu train, bagualu slurm, bagualu rehearse"),
        (["checkpoint", "list", "run.dir=/no/such/run"], "/no/such/run/checkpoints does not exist"),
        (["train", "optim.lr=1e-3,3e-3"], "add -m to run them one after the other"),
        (["train", "train.stps=1,2"], "did you mean train.steps?"),
        (["train", "--jsn"], "did you mean --json?"),
        (["train", "--json=true"], "--json takes no value"),
        (["train", "--cfg=all"], "give --cfg job"),
        (["train", "--lr=1e-3"], "give optim.lr=1e-3"),
        (["train", "--train.steps", "3"], "give train.steps=VALUE"),
        (["train", "--micro-batch=4"], "give train.micro_batch=4"),
        (["train", "--no-compare"], "an option of bagualu rehearse"),
        (["-m", "optim.lr=1,2"], "a verb comes first, e.g. bagualu train -m optim.lr=1,2"),
        (["train", "train.stps=3"], "did you mean train.steps?"),
        (["train", "recipe=bench_dense", "parallel.tensor=3"], "model.heads=8 is not divisible by parallel.tensor=3"),
        (["train", "parallel.data=3"], "parallel.expert=2 must divide"),
        (["train", "model.moe.experts=3"], "give model.moe.experts=4"),
        (["train", "model.heads=5", "model.kv_heads=5"], "model.hidden=200"),
        (["train", "train.micro_batch=3"], "train.micro_batch=3 does not divide"),
        (["train", "data.global_batch=5"], "give data.global_batch=8"),
        (["train", "parallel.pipeline=8"], "parallel.pipeline=4 or less"),
        (["train", "launch.workers=3"], "needs 4 ranks but the world has 3"),
        (["train", "launch.workers=8"], "needs 4 ranks but the world has 8"),
        (["train", "launch.nodes=3"], "launch.nodes=3 do not divide the 4 ranks"),
        (["train", "launch.nodes=0"], "launch.nodes=0 must be at least 1"),
        (["train", "parallel.tensor=0"], "give parallel.tensor=1"),
        (["train", "parallel.balance=3"], "give uniform, analytic, measured or a list of 2 layer counts"),
        (["train", "parallel.engine=ddp"], "parallel.engine=ddp is unknown; give one of native"),
        (["train", "parallel.virtual_stages=2"], "give parallel.virtual_stages=1"),
        (["train", "model.initial_std=-1"], "e.g. model.initial_std=0.02"),
        (["train", "train.compile=true", "comm.backend=simulated"], "give train.compile=false"),
        (["train", "launch.nodes=2"], "bagualu slurm"),
        (["train", "launch.nodes=2", "comm.backend=simulated"], "comm.backend=simulated runs in one process"),
        (["slurm", "comm.backend=simulated"], "comm.backend=simulated runs in one process"),
        (["train", "comm.backend=mpi"], "gloo, nccl, simulated"),
        (["train", "cluster=h100", "comm.backend=gloo"], "cluster=h100 is for ranks that are simulated"),
        (["train", "cluster=h10", "comm.backend=simulated"], "h100"),
        (["train", "cluster=mixed_h100_a100", "comm.backend=simulated"], "world=4: cluster=mixed_h100_a100 is mixed"),
        (["train", "data.source=/no/such/corpus"], "data.source=/no/such/corpus is not there"),
        (["train", "data.source=~/no/such/corpus"], "/no/such/corpus is not there"),
        (["train", "data.source="], "e.g. data.source=my_texts"),
        (["train", "run.dir="], "e.g. run.dir=runs/tiny"),
        (["rehearse", "run.dir=", "faults=[kill@step=5]"], "e.g. run.dir=runs/tiny"),
        (["train", "run.seed=99999999999999999999999"], "run.seed=99999999999999999999999 must lie between"),
        (["train", "data.global_batch=2097152"], "give data.global_batch=262144 or less"),
        (["slurm", "comm.backend=nccl", "launch.slurm.gpus_per_node=2"], "give launch.slurm.gpus_per_node=4"),
        (["train", "-m"], "optim.lr=1e-3,3e-4"),
        (["train", "-m", "optim.lr=1e-3,x"], "optim.lr takes a number"),
        (["train", "-m", "train.steps=1,2", "run.dir=x,x"], "leave run.dir out"),
    ],
)
def test_wrong_input_is_one_line_with_the_fix_and_exit_code_2(capsys, tmp_path, monkeypatch, words, fix):
    monkeypatch.chdir(tmp_path)
    assert fix in refused(capsys, *words)
    assert list(tmp_path.iterdir()) == []


def test_a_port_in_use(capsys, tmp_path):
    with socket.socket() as taken:
        taken.bind(("", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert "leave it out for a free one" in refused(capsys, "train", f"launch.port={port}", f"run.dir={tmp_path}/run")


def test_nccl_without_enough_gpus(capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(preflight, "gpu_count", lambda: 1)
    line = refused(capsys, "train", "comm.backend=nccl", f"run.dir={tmp_path}/run")
    assert "needs 4 GPUs here, one a worker, and finds 1; give comm.backend=gloo or launch.workers=1" in line


def test_threads_on_a_gpu_that_is_not_there(capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(preflight, "gpu_count", lambda: 0)
    line = refused(capsys, "train", "comm.backend=simulated", "comm.device=cuda", f"run.dir={tmp_path}/run")
    assert "comm.device=cuda needs an NVIDIA GPU, and finds none here; give comm.device=cpu" in line


def a_run(folder, *overrides):
    save_recipe(compose([f"run.dir={folder}", *overrides]))
    (folder / "metrics.jsonl").write_text('{"step": 1}\n')
    return f"run.dir={folder}"


def test_a_run_is_not_overwritten(capsys, tmp_path):
    line = refused(capsys, "train", a_run(tmp_path / "run"))
    assert "checkpoint.resume=true" in line
    assert f"run.dir={tmp_path}/run-2" in line


def test_a_run_that_is_not_there_is_not_gone_on_with(capsys, tmp_path, monkeypatch):
    """A name typed wrongly would else begin a run with the recipe that is the default."""
    monkeypatch.chdir(tmp_path)
    assert refused(capsys, "train", "run.dir=runs/typo", "checkpoint.resume=true", "train.steps=9") == (
        "bagualu: error: run.dir=runs/typo holds no run to go on with (config.yaml is missing); give the directory of a run, or "
        "recipe=NAME to begin one there\n"
    )
    assert list(tmp_path.iterdir()) == []
    require_resumed_run(["run.dir=runs/typo", "checkpoint.resume=true", "recipe=tiny"])
    require_resumed_run(["run.dir=runs/typo", "checkpoint.resume=false"])
    require_resumed_run(["checkpoint.resume=true"])
    require_resumed_run([a_run(tmp_path / "run"), "checkpoint.resume=true"])


def test_a_run_does_not_go_on_with_another_model(capsys, tmp_path):
    words = ["train", a_run(tmp_path / "run"), "checkpoint.resume=true", "model.moe.experts=8"]
    assert "has model.moe.experts=4, not 8; give model.moe.experts=4" in refused(capsys, *words)


def test_the_rate_of_biases_may_change_but_not_whether_there_are_any(tmp_path):
    (tmp_path / "run").mkdir()
    rate = "model.moe.bias_rate="
    words = [a_run(tmp_path / "run", "recipe=moe_tiny", rate + "0.001"), "recipe=moe_tiny", "checkpoint.resume=true"]
    (tmp_path / "run/checkpoints").mkdir()
    (tmp_path / "run/checkpoints" / EPOCH).touch()
    preflight.check_run_directory(compose([*words, rate + "0.0"]))
    with pytest.raises(RecipeError, match=r"has model\.moe\.bias_rate=0\.001, not null; give model\.moe\.bias_rate=0\.001"):
        preflight.check_run_directory(compose(words))


def test_a_run_does_not_go_on_with_other_data_and_keeps_its_recipe(capsys, tmp_path):
    words = ["train", a_run(tmp_path / "run"), "checkpoint.resume=true"]
    before = (tmp_path / "run/config.yaml").read_text()
    assert "has data.global_batch=16, not 32; give data.global_batch=16" in refused(capsys, *words, "data.global_batch=32")
    assert "has run.seed=0, not 1; give run.seed=0" in refused(capsys, *words, "run.seed=1")
    split = "data.validation_fraction=0.1"
    assert "has data.validation_fraction=0.05, not 0.1; give data.validation_fraction=0.05" in refused(capsys, *words, split)
    assert (tmp_path / "run/config.yaml").read_text() == before


@pytest.mark.parametrize("name", [".", "..", "../run", "sub/.."])
def test_a_run_in_a_folder_however_it_is_named_is_not_overwritten(capsys, tmp_path, monkeypatch, name):
    folder = tmp_path / "run"
    a_run(folder)
    (folder / "sub").mkdir()
    monkeypatch.chdir(folder / "sub" if name == ".." else folder)
    free = re.search(r"start anew with another folder, e.g. run.dir=(.*)", refused(capsys, "train", f"run.dir={name}"))
    assert free
    assert (folder / free[1]).resolve() == tmp_path / "run-2"


def test_a_run_does_not_go_on_to_fewer_steps_than_it_has_done(capsys, tmp_path):
    words = ["train", a_run(tmp_path / "run", "train.steps=3"), "checkpoint.resume=true"]
    (tmp_path / "run/checkpoints/step-00000003").mkdir(parents=True)
    (tmp_path / "run/checkpoints" / EPOCH).touch()
    assert "has done 3 steps; give more, e.g. train.steps=6, or another run.dir" in refused(capsys, *words, "train.steps=1")
    for enough in (3, 6):
        preflight.check_run_directory(compose([*words[1:], f"train.steps={enough}"]))


def test_a_source_is_looked_into_before_anything_starts(capsys, tmp_path, monkeypatch):
    corpus, run = tmp_path / "corpus", f"run.dir={tmp_path}/run"
    (corpus / "sub").mkdir(parents=True)
    (corpus / "empty.txt").touch()
    monkeypatch.setenv("HOME", str(tmp_path))
    assert f"{corpus} holds no text; put UTF-8 text files there" in refused(capsys, "train", run, "data.source=~/corpus")
    (corpus / "sub/text.txt").write_text("text")
    recipe = compose([run, "data.source=~/corpus"])
    preflight.check(recipe, recipe.world_size())


def test_a_directory_where_nothing_was_trained_yet_is_used(tmp_path):
    folder = tmp_path / "run"
    recipe = compose([f"run.dir={folder}"])
    save_recipe(recipe)
    preflight.check_run_directory(recipe)


def test_cfg_job_prints_a_recipe_that_can_be_read_back(capsys, tmp_path):
    assert cli.main(["train", "--cfg", "job", "train.steps=7"]) == 0
    (tmp_path / "config.yaml").write_text(capsys.readouterr().out)
    assert preflight.load_recipe(tmp_path / "config.yaml") == compose(["train.steps=7"])
    assert cli.main(["train", "--cfg", "job", "train.steps=7", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["train"]["steps"] == 7


def test_every_job_of_a_sweep_has_a_directory_of_its_own(capsys):
    assert cli.main(["train", "-m", "--cfg=job", "--json", "optim.lr=1e-3,3e-4", "train.steps=1,2"]) == 0
    recipes = json.loads(capsys.readouterr().out)
    assert len({recipe["run"]["dir"] for recipe in recipes}) == 4
    assert sorted({recipe["optim"]["lr"] for recipe in recipes}) == [3e-4, 1e-3]
    assert all(recipe["run"]["dir"].startswith("runs/tiny-optim.lr=") for recipe in recipes)


def test_json_tells_of_a_refusal_too(capsys):
    assert cli.main(["train", "nonsense=1", "--json"]) == 2
    out, err = capsys.readouterr()
    assert json.loads(out)["ended"] == "refused"
    assert len(err.splitlines()) == 1

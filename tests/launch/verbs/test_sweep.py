"""The jobs that a sweep stands for: their values as typed, their run directories, and what cannot be listed."""

import pytest

from bagualu.comm.errors import RecipeError
from bagualu.launch.verbs.sweep import jobs
from bagualu.trainer.recipe.compose import compose


def test_the_last_key_changes_fastest_and_each_job_has_its_recipe_and_folder():
    found = jobs(["run.dir=runs/it", "optim.lr=1e-3,3e-4", "train.steps=1,2"])
    assert [(job.recipe.optim.lr, job.recipe.train.steps) for job in found] == [(1e-3, 1), (1e-3, 2), (3e-4, 1), (3e-4, 2)]
    assert found[1].recipe.run.dir == "runs/it-optim.lr=0.001,train.steps=2"
    for job in found:
        assert compose(job.overrides) == job.recipe


@pytest.mark.parametrize(
    "values",
    [
        "2024_01_01,1e3,007",
        "true,yes,null",
        "八卦,炉",
        "é,e",
        '"a, b",c',
        "12:30:00,a=b",
        "~/a,b",
        "it's,a(b)",
        "choice(2024_01,1e3)",
    ],
)
def test_text_is_swept_as_typed(values):
    found = jobs([f"log.wandb_project={values}"])
    texts = [job.recipe.log.wandb_project for job in found]
    typed = values.removeprefix("choice(").removesuffix(")") if values.startswith("choice") else values.replace('"', "")
    assert ",".join(texts) == typed
    assert len({job.recipe.run.dir for job in found}) == len(found)
    for job in found:
        assert compose(job.overrides) == job.recipe


def test_lists_and_text_of_lists_are_swept(tmp_path):
    found = jobs(['launch.slurm.setup=[a, 1e3],["b, c"],[]', "parallel.balance=[3,1],[2,2]", f"run.dir='{tmp_path}/a, b'"])
    assert [job.recipe.launch.slurm.setup for job in found] == [["a", "1e3"]] * 2 + [["b, c"]] * 2 + [[]] * 2
    assert found[0].recipe.parallel.balance == [3, 1]
    for job in found:
        assert compose(job.overrides) == job.recipe


def test_folders_differ_where_only_signs_do_and_stay_short_enough_for_a_file_system():
    found = jobs(["data.source=a/b,a_b,a b", "run.name=it"])
    assert found[0].recipe.run.dir == "runs/it-data.source=a_b"
    assert len({job.recipe.run.dir for job in found}) == 3
    long = [f"{end}{'八' * 200}" for end in "abc"]
    found = jobs([f"data.source={','.join(long)}"])
    assert len({job.recipe.run.dir for job in found}) == 3
    assert all(len(job.recipe.run.dir.split("/")[-1].encode()) < 255 for job in found)


@pytest.mark.parametrize(
    ("overrides", "fix"),
    [
        (["optim.lr=1e-3"], "no key has several values"),
        (["optim.lr=1e-3,1e-3"], "optim.lr=0.001 twice"),
        (["train.steps=1,2", "run.dir=x,x"], "leave run.dir out"),
        (["optim.lr=interval(0,1)"], "does not list its values"),
        (["recipe=glob(*)"], "does not list its values"),
        (["train.steps=range(5,1)"], "stands for no value"),
        (["train.steps=range(1,5,0)"], "cannot be listed"),
        (["train.steps=1,x"], "takes an integer"),
        (["train.stps=1,2"], "did you mean train.steps?"),
        (["data.source=a,'b"], "quote a value"),
    ],
)
def test_what_is_no_sweep_is_refused_in_one_line(overrides, fix):
    with pytest.raises(RecipeError) as caught:
        jobs(overrides)
    assert fix in str(caught.value)
    assert "\n" not in str(caught.value)

"""The cases of tests/bench/this_machine.py: each axis and each schedule, as recipes that can run."""

import sys
from pathlib import Path

import pytest
import yaml

from bagualu.comm.cluster_file import read_cluster
from bagualu.launch.machine.cluster_text import cluster_text
from bagualu.launch.machine.figures import ProductTime, RankFigures
from bagualu.parallel.pipeline.registry import SCHEDULES
from bagualu.trainer.recipe.compose import compose

sys.path.insert(0, str(Path(__file__).parent))

from this_machine import Case, arguments, cases, predicted

ALL = cases(arguments(["--cluster", "this.yaml"]))
GPU = cases(arguments(["--cluster", "this.yaml", "--device", "cuda"]))


def test_each_axis_and_each_schedule_is_a_case_of_both_recipes() -> None:
    variants = {(case.recipe, case.entry.variant) for case in ALL}
    for recipe in ("bench_dense", "bench_moe"):
        assert variants >= {(recipe, variant) for variant in ("", "data", "tensor", *SCHEDULES)}
    assert ("bench_moe", "expert") in variants
    assert ("bench_dense", "expert") not in variants


@pytest.mark.parametrize("case", [*ALL, *GPU], ids=lambda case: f"{case.recipe}-{case.entry.name}")
def test_a_case_is_a_recipe_of_its_processes_whose_stages_do_not_depend_on_measuring(case: Case) -> None:
    recipe = compose(case.predicted_words())
    layout = recipe.validate(case.entry.processes)
    assert layout.world == case.entry.processes
    assert recipe.parallel.balance != "measured"
    if case.entry.axis:
        assert layout.size(case.entry.axis) == 2


def test_on_a_gpu_the_models_for_gpus_are_measured_in_one_process() -> None:
    assert [(case.recipe, case.entry.processes) for case in GPU] == [("bench_dense_1b", 1), ("bench_moe_2b", 1)]
    for case in GPU:
        recipe = compose(case.predicted_words())
        assert (recipe.comm.backend, recipe.train.deterministic) == ("nccl", False)


@pytest.mark.parametrize(
    ("words", "fix"),
    [
        (["--device", "cuda", "--recipes", "bench_dense"], "give --recipes bench_dense_1b bench_moe_2b"),
        (["--device", "cuda", "operators"], "tests/bench/gpu.py lists a GPU's kernels"),
    ],
)
def test_what_no_gpu_measures_is_refused(words: list[str], fix: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        arguments(words)
    assert fix in capsys.readouterr().err


@pytest.mark.parametrize("case", GPU, ids=lambda case: case.recipe)
def test_a_gpu_that_doctor_measured_predicts_its_cases(case: Case) -> None:
    """Times of products and copies and the number of multiprocessors suffice, which is all that doctor measures of a GPU."""
    products = [ProductTime(dtype, m, m, m, 2.0 * m**3 / rate) for dtype in ("bfloat16", "float32") for m, rate in (
        (512, 1e14), (8192, 7e14))]  # fmt: skip
    gpu = RankFigures(1, "cuda", "NVIDIA H200", 8, 140 * 10**9, 10**9, products=products, copy_bytes_per_second=4e12,
                      launch_seconds=4e-6, cores=132)  # fmt: skip
    cluster = read_cluster(yaml.safe_load(cluster_text([gpu], None)), "this", "this.yaml")
    found = predicted(case, cluster)
    assert found.fits
    assert 0.2 < found.mfu < 1
    assert sum(found.parts().values()) == pytest.approx(found.step_seconds)

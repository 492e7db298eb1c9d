"""What ranks measure: each thing of the plan, on the sizes of the plan."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from bagualu.comm.cost import KINDS
from bagualu.comm.group import Communicator
from bagualu.launch.machine.figures import RankFigures
from bagualu.launch.machine.plan import FULL, QUICK, Grid, Sample
from bagualu.launch.machine.worker import check, figures_of_rank, recipe_of
from bagualu.trainer.recipe.config import Recipe
from tests.harness import run

PLAN = replace(
    QUICK, cpu=Grid((32,), (16, 64)), few=Grid((32,), (16,)), product_seconds=1e-4, copied_bytes=2**20, message_bytes=(1024, 4096)
)


def figures(communicator: Communicator, cache: Path) -> RankFigures:
    return figures_of_rank(communicator, PLAN, communicator.world.barrier, cache)


def works(communicator: Communicator) -> bool:
    return bool(check(Recipe(), communicator, lambda: False)["works"])


def test_a_rank_measures_each_thing_of_the_plan(tmp_path: Path) -> None:
    one, other = run("gloo", 2, figures, tmp_path)
    shapes = [(product.dtype, product.m, product.n, product.k) for product in one.products]
    assert len({shape for shape in shapes if shape[0] == "bfloat16"}) == 4
    assert {dtype for dtype, *_ in shapes} >= {"float64", "float32", "bfloat16"}
    assert {(link.kind, link.bytes) for link in one.links} == {(kind, size) for kind in KINDS for size in (1024, 4096)}
    names = {sample.name for sample in one.operators}
    assert {"aten.silu.default", "aten._fused_adamw_.default", "aten.embedding.default"} <= names
    assert names & {"aten.bmm.default", "aten._scaled_dot_product_flash_attention_for_cpu.default"}, "attention, by kind of CPU"
    assert not names & {"aten.mm.default", "aten.addmm_.default", "aten.view.default", "aten.empty.memory_format"}
    assert min(one.copy_bytes_per_second, one.launch_seconds, one.memory_bytes, one.context_bytes) > 0
    assert (one.device, one.ranks, other.ranks, one.cores) == ("cpu", 2, 2, None)
    assert all(sample.seconds > 0 for sample in one.operators)
    times = {(time.name, time.variant): time.seconds for time in one.variants}
    assert times.keys() >= {("attention", "blocks"), ("attention", "kernel")}
    assert one.variants[0].shape["length"] == PLAN.variants[0].sequence_length
    assert other.variants == []
    kept = [json.loads(path.read_text())["figures"] for path in (tmp_path / "operators").iterdir()]
    assert {variant: seconds for (name, variant), seconds in times.items() if name == "attention"} in kept
    assert len(kept) == len({(time.name, str(time.shape)) for time in one.variants})


@pytest.mark.parametrize("sample", [*FULL.samples, *QUICK.samples, *FULL.variants, *QUICK.variants], ids=str)
def test_a_sample_is_a_valid_recipe_of_one_rank(sample: Sample) -> None:
    recipe = recipe_of(sample)
    assert recipe.validate(1).world == 1
    assert recipe.micro_batches() == 1


def test_a_backend_that_sums_rightly_works() -> None:
    assert run("gloo", 2, works) == [True, True]

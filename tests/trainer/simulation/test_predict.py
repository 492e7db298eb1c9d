"""The figures of a prediction follow from its cluster and recipe as they should."""

from dataclasses import replace

import pytest

from bagualu.comm.cluster_file import load_cluster
from bagualu.comm.errors import RecipeError
from bagualu.comm.topology import Chip, Cluster, ClusterPart, LinkTier
from bagualu.parallel.memory_kinds import GRADIENTS, MASTERS, MOMENTS, PARAMETERS
from bagualu.trainer.recipe.compose import compose
from bagualu.trainer.recipe.config import Recipe
from bagualu.trainer.simulation.predict import Prediction, predict

SMALL = ["recipe=tiny_dense", "train.dtype=bfloat16", "data.global_batch=16", "train.micro_batch=1", "parallel.data=null"]


def recipe_of(*words: str) -> Recipe:
    return compose([*SMALL, *words])


def scaled(cluster: Cluster, factor: float) -> Cluster:
    """The cluster with all rates `factor` times as high, and all fixed times as much lower."""

    def chip(one: Chip) -> Chip:
        peaks = {dtype: peak * factor for dtype, peak in one.matmul_flops_per_second.items()}
        return replace(one, matmul_flops_per_second=peaks, memory_bytes_per_second=one.memory_bytes_per_second * factor,
                       launch_seconds=one.launch_seconds / factor)  # fmt: skip

    def tier(one: LinkTier) -> LinkTier:
        peer = None if one.peer_bytes_per_second is None else one.peer_bytes_per_second * factor
        return replace(one, latency_seconds=one.latency_seconds / factor, bytes_per_second=one.bytes_per_second * factor,
                       peer_bytes_per_second=peer)  # fmt: skip

    def part(one: ClusterPart) -> ClusterPart:
        return replace(one, chip=chip(one.chip), tiers=tuple(map(tier, one.tiers)))

    return replace(cluster, parts=tuple(map(part, cluster.parts)), start_seconds=cluster.start_seconds / factor)


LAYOUT = ["parallel.tensor=2", "parallel.pipeline=2"]


@pytest.fixture(scope="module")
def usual() -> Prediction:
    return predict(recipe_of(*LAYOUT), load_cluster("h100"), 16)


def test_a_cluster_twice_as_fast_in_everything_takes_half_the_time(usual: Prediction) -> None:
    twice = predict(recipe_of(*LAYOUT), scaled(load_cluster("h100"), 2.0), 16)
    assert twice.step_seconds == pytest.approx(usual.step_seconds / 2, rel=1e-9)
    assert twice.mfu == pytest.approx(usual.mfu, rel=1e-9)
    assert twice.fullest.peak.bytes == usual.fullest.peak.bytes


def test_the_parts_add_up_to_the_step(usual: Prediction) -> None:
    assert sum(usual.parts().values()) == pytest.approx(usual.step_seconds, rel=1e-9)
    assert {
        "matrix products",
        "attention",
        "other kernels",
        "tensor communication",
        "waiting in the pipeline",
    } <= usual.parts().keys()


def test_recomputation_raises_what_is_executed_and_not_what_the_model_needs(usual: Prediction) -> None:
    again = predict(recipe_of(*LAYOUT, "train.recompute=full"), load_cluster("h100"), 16)
    assert again.model_flops == usual.model_flops
    assert 1.2 < again.executed_flops / usual.executed_flops < 4 / 3
    assert again.hfu / again.mfu > usual.hfu / usual.mfu
    assert again.fullest.peak.bytes < usual.fullest.peak.bytes


def test_executed_flops_are_those_of_the_model_where_nothing_is_computed_again() -> None:
    """The formula of MFU leaves out nothing that the trace executes, but the backward pass of attention, which kernels do with five
    products where the formula counts four."""
    prediction = predict(recipe_of("model.vocab=2048"), load_cluster("h100"), 16)
    assert prediction.executed_flops / prediction.model_flops == pytest.approx(1.0, abs=0.03)


def test_a_mixed_cluster_has_the_peaks_and_limits_of_its_parts() -> None:
    mixed = load_cluster("mixed_h100_a100")
    prediction = predict(recipe_of("parallel.pipeline=2"), mixed, 16)
    peaks = [part.chip.peak("bfloat16") for part in prediction.cluster.parts]
    assert prediction.peak_flops_per_second == pytest.approx(8 * sum(peaks))
    limits = [part.chip.memory_bytes - part.chip.context_bytes for part in prediction.cluster.parts]
    assert [memory.limit_bytes for memory in prediction.memory] == limits
    assert [memory.chip for memory in prediction.memory] == [part.chip for part in prediction.cluster.parts]


def test_the_fullest_rank_is_that_whose_chip_has_least_to_spare() -> None:
    """Without a pipeline, ranks at its only coordinate have different chips, and those with the smaller chip are not the first."""
    large, small = load_cluster("mixed_h100_a100").parts
    small = replace(small, chip=replace(small.chip, memory_bytes=small.chip.memory_bytes // 2))
    prediction = predict(recipe_of(), replace(load_cluster("mixed_h100_a100"), parts=(large, small)), 16)
    assert prediction.fullest.chip == small.chip
    assert prediction.fullest.limit_bytes == small.chip.memory_bytes - small.chip.context_bytes


def test_the_recipes_own_backend_does_not_matter() -> None:
    first, second = (predict(recipe_of(f"comm.backend={name}"), load_cluster("h100"), 16) for name in ("gloo", "nccl"))
    assert first.step_seconds == second.step_seconds


def test_a_dtype_that_the_chip_does_not_multiply_is_refused() -> None:
    cluster = load_cluster("a100")
    chip = replace(cluster.parts[0].chip, matmul_flops_per_second={"float16": 3.12e14})
    with pytest.raises(RecipeError, match="no matmul peak is known for A100"):
        predict(recipe_of(), replace(cluster, parts=(replace(cluster.parts[0], chip=chip),)), 16)


def test_frozen_weights_beside_factors_take_no_gradients_states_and_less_time(usual: Prediction) -> None:
    factors = predict(recipe_of(*LAYOUT, "model.lora.rank=4"), load_cluster("h100"), 16)
    before, after = usual.fullest.peak.by_kind, factors.fullest.peak.by_kind
    assert after[PARAMETERS] > 0.9 * before[PARAMETERS]
    for kind in (GRADIENTS, MASTERS, MOMENTS):
        assert 0 < after[kind] < 0.2 * before[kind], kind
    assert factors.model_flops < 0.75 * usual.model_flops
    assert factors.executed_flops < 0.75 * usual.executed_flops

"""Rows of published runs are described by rules: which figures count, which recipe and cluster it means, and why not."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))  # the benchmarks are programs, not an installed package

from published.describe import describe
from published.families import Unknown
from published.predicted import TEST, Figures, Predicted
from published.report import correlation, quantile
from published.rows import Row
from published_runs import held_out

GPT = {
    "run_id": "1", "model": "GPT-39.1B", "params_b": "39.1", "layers": "48", "hidden": "8192", "heads": "64", "kv_heads": "64",
    "ffn": "32768", "vocab": "50257", "seq_len": "2048", "hardware": "A100 (some cluster)", "devices_per_node": "8",
    "intra_node_gbytes_s_per_dev": "150", "inter_node_gbits_s_per_dev": "100", "n_devices": "512", "dp": "16", "tp": "8", "pp": "4",
    "vpp": "1", "ep": "1", "cp": "1", "sp": "0", "sharding": "ZeRO-1", "gbs": "1536", "mbs": "2", "schedule": "1f1b",
    "recompute": "full", "precision": "fp16", "framework": "Megatron-DeepSpeed", "iter_time_s": "14.7",
    "iter_time_kind": "reported",
}  # fmt: skip
LLAMA = {
    **GPT, "model": "LLAMA3_70B", "params_b": "70.6", "layers": "80", "kv_heads": "8", "ffn": "28672", "vocab": "128256",
    "seq_len": "8192", "hardware": "H100-SXM-80GB (DGX-H100)", "n_devices": "64", "dp": "2", "tp": "4", "pp": "8", "vpp": "5",
    "sp": "", "sharding": "distributed optimizer", "gbs": "128", "mbs": "1", "schedule": "interleaved-1f1b", "recompute": "",
    "precision": "bf16", "framework": "Megatron-Bridge/Core",
}  # fmt: skip


FORMULA = {"iter_time_kind": "derived from hardware-FLOPs formula"}


def row(base: dict[str, str] = GPT, **cells: str) -> Row:
    return Row({**base, **cells})


@pytest.mark.parametrize(
    ("cells", "seconds", "gib", "fits", "reasons"),
    [
        ({}, 14.7, None, True, 0),
        ({"mem_gib": "56", "mem_kind": "max nvidia-smi GB on first/last stage"}, 14.7, 56, True, 0),
        ({"iter_time_kind": "derived from hardware-FLOPs formula"}, None, None, None, 1),
        (
            {"iter_time_kind": "derived from hardware-FLOPs formula", "mem_gib": "40", "mem_kind": "max over ranks, GiB"},
            None,
            40,
            True,
            1,
        ),
        ({"mem_gib": "55", "mem_kind": "params+opt, read off Fig.1"}, 14.7, None, True, 1),
        ({"iter_time_s": "", "iter_time_kind": "OOM", "mem_kind": "OOM on 80GB"}, None, None, False, 0),
        ({"iter_time_s": ""}, None, None, None, 1),
    ],
)
def test_only_measured_figures_count(
    cells: dict[str, str], seconds: float | None, gib: float | None, fits: bool | None, reasons: int
) -> None:
    published, why = row(**cells).published()
    assert (published.step_seconds, published.fits, len(why)) == (seconds, fits, reasons)
    assert published.memory_bytes == (None if gib is None else gib * 2**30)


def test_a_row_becomes_a_recipe_on_a_cluster() -> None:
    run = describe(row())
    model, parallel = run.recipe.model, run.recipe.parallel
    assert (model.activation, model.norm, model.tie_embeddings, model.vocab) == ("gelu", "layer", True, 51200)
    assert (parallel.data, parallel.tensor, parallel.pipeline, parallel.zero, parallel.schedule) == (16, 8, 4, 1, "1f1b")
    assert (run.recipe.train.dtype, run.recipe.train.recompute, run.recipe.train.micro_batch) == ("float16", "full", 2)
    assert (run.world, run.attention, run.cluster.name) == (512, "unfused", "a100")
    assert [tier.bytes_per_second for tier in run.cluster.parts[0].tiers] == [2.35e11, 1.25e10]


@pytest.mark.parametrize(
    ("hardware", "cluster"),
    [
        ("A100-40GB", "a100_40gb"),
        ("A100 SXM 40 GB", "a100_40gb"),
        ("40GB A100", "a100_40gb"),
        ("A100-SXM-80GB", "a100"),
        ("8xA100", "a100"),
        ("8 x A100_80GB", "a100"),
        ("GB200 (NVL72)", "gb200"),
    ],
)
def test_a_chip_is_found_by_its_name_and_memory(hardware: str, cluster: str) -> None:
    assert describe(row(hardware=hardware, precision="bf16")).cluster.name == cluster


def test_biases_are_those_of_the_family() -> None:
    assert describe(row()).recipe.model.bias == "all"
    assert describe(row(LLAMA, model="Qwen2.5-72B", params_b="")).recipe.model.bias == "attention"


def test_a_kernel_of_attention_is_slower_on_chips_it_was_not_written_for() -> None:
    mpt = {"model": "MPT-30b", "framework": "Composer/FSDP", "sharding": "FSDP FULL_SHARD", "params_b": "", "gbs": "1024"}
    runs = [
        describe(row(**mpt, dp="512", tp="1", pp="1", hardware=hardware, precision="bf16"))
        for hardware in ("A100-80GB", "H100-80GB")
    ]
    assert 1 < runs[0].attention_slower < runs[1].attention_slower
    assert describe(row(LLAMA)).attention_slower == 1


def test_columns_that_are_empty_mean_what_the_framework_does() -> None:
    run = describe(row(LLAMA))
    parallel = run.recipe.parallel
    assert (parallel.schedule, parallel.virtual_stages, parallel.sequence) == ("interleaved_1f1b", 5, True)
    assert (run.recipe.train.recompute, run.attention) == ("none", "fused")
    assert describe(row(LLAMA, tp="1", dp="8")).recipe.parallel.sequence is False


def test_selective_recomputation_computes_the_scores_again() -> None:
    again = describe(row(recompute="selective", framework="Megatron-LM 2022"))
    assert (again.recipe.train.recompute, again.attention) == ("none", "unfused_again")
    assert describe(row(LLAMA, recompute="selective")).attention == "fused"


@pytest.mark.parametrize(
    ("cells", "balance"),
    [
        ({}, "uniform"),
        ({"layers": "46", "params_b": "", "pp_partition": "type:transformer"}, [12, 12, 12, 10]),
        ({"layers": "46", "params_b": ""}, [11, 12, 12, 11]),
    ],
)
def test_how_layers_are_divided(cells: dict[str, str], balance: object) -> None:
    assert describe(row(**cells)).recipe.parallel.balance == balance


def test_memory_that_is_stated_of_the_ends_of_the_pipeline() -> None:
    assert describe(row(mem_kind="max nvidia-smi GB on first/last stage")).stages == (0, 3)
    assert describe(row(mem_kind="max nvidia-smi GB")).stages is None


@pytest.mark.parametrize(
    ("cells", "reason"),
    [
        ({"model": "DeepSeekV3"}, "latent attention"),
        ({"model": "GPT OSS 120B"}, "attention sinks"),
        ({"model": "Falcon-40B"}, "the architecture of Falcon-40B is not known"),
        ({"hardware": "TPU v5p"}, "no cluster file of TPU v5p"),
        ({"hardware": "H100-SXM-96GB HBM2e 500W"}, "no cluster file of H100-SXM-96GB"),
        ({"hardware": "H100 PCIe 80GB"}, "no cluster file of H100 PCIe"),
        ({"hardware": "GH200 96GB"}, "no cluster file of GH200"),
        ({"hardware": "A100X"}, "no cluster file of A100X"),
        ({"framework": "JAX"}, "the framework JAX is not known"),
        ({"dp": "32"}, r"the degrees \(32, 8, 4, 1\) do not multiply to 512 devices"),
        ({"gbs": ""}, "the column gbs is missing"),
        ({"gbs": "1000"}, "the recipe is refused: data.global_batch=1000 does not divide"),
        ({"precision": "NVFP4"}, "precision=NVFP4 is not known"),
        ({"recompute": "selective op"}, "which operators are computed again"),
        ({"sharding": "HSDP"}, "sharding=HSDP is not known"),
        ({"schedule": "dualpipe"}, "the schedule dualpipe is not known"),
        ({"layers": "47", "params_b": ""}, "how 47 layers divide over 4 stages"),
        ({"params_b": "20"}, "describe a model of 39.1 billion parameters, not of 20"),
        ({"cp": "2", "dp": "8"}, "the recipe is refused: parallel.context=2 is not supported"),
    ],
)
def test_a_row_that_cannot_be_described_says_why(cells: dict[str, str], reason: str) -> None:
    with pytest.raises(Unknown, match=reason):
        describe(row(**cells))


def test_a_held_out_error_names_the_chip() -> None:
    """Several cluster files may describe the same chip."""
    of, run = row(), describe(row())
    (error,) = held_out([Predicted(of, TEST, "", of.published()[0], run, Figures(14.7 * 1.25, 0, True))])
    assert (error.chip, error.devices, error.kind) == (run.cluster.parts[0].chip.name, 512, "dense")
    assert error.chip.startswith("A100 ")
    assert error.error == pytest.approx(0.25)


def test_quantiles_and_rank_correlation() -> None:
    assert (quantile([3, 1, 2], 0.5), quantile(range(1, 11), 0.9), quantile([5], 0.9)) == (2, 9, 5)
    assert correlation([1, 2, 3], [10, 20, 30]) == pytest.approx(1)
    assert correlation([1, 2, 3], [3, 2, 1]) == pytest.approx(-1)
    assert correlation([1, 1, 2], [1, 2, 3]) == pytest.approx(0.866, abs=1e-3)

"""The time of an operator: of a product by its shape, of others by their bytes, of small ones by the launch."""

from dataclasses import replace
from math import prod

import pytest

from bagualu.comm.cluster_file import load_cluster
from bagualu.comm.errors import RecipeError
from bagualu.comm.topology import Chip, ShapeEfficiency
from bagualu.parallel.simulation.events import Operator, TensorType
from bagualu.parallel.simulation.operator_cost import FUSED_ATTENTION, Product, efficiency, operator_seconds, product_of, rate

SHAPES = [(m, n, k) for m in (256, 2048, 8192) for n in (512, 4096) for k in (64, 1024, 16384)]


def measured(m: int, n: int, k: int) -> float:
    """The efficiency of a chip that multiplies with 80% of its peak, but stands still for 200 elements of k at each tile, and has
    half of its cores idle at 2 million results."""
    return 1 / (1.25 + 200 / k + 2.5e6 / (m * n))


TABLE = tuple(ShapeEfficiency(m, n, k, measured(m, n, k)) for m, n, k in SHAPES)


@pytest.fixture
def chip() -> Chip:
    """A GPU of which the number of cores is not known."""
    found = load_cluster("a100").parts[0].chip
    return replace(found, cores=None, memory_fraction=1.0, efficiency={"bfloat16": TABLE})


def reached(chip: Chip, m: int, n: int, k: int) -> float:
    return efficiency(chip, Product(1, m, n, k, "bfloat16"))


def operator(
    name: str, inputs: list[tuple[int, ...]], output: tuple[int, ...], flops: int = 0, dtype: str = "bfloat16"
) -> Operator:
    given, made = tuple(TensorType(dtype, shape) for shape in inputs), (TensorType(dtype, output),)
    return Operator(name, given, made, 2 * sum(map(prod, inputs)), 2 * prod(output), flops)


def product(m: int, n: int, k: int) -> Operator:
    return operator("aten.mm.default", [(m, k), (k, n)], (m, n), 2 * m * n * k)


@pytest.mark.parametrize("shape", SHAPES)
def test_an_efficiency_of_the_table_is_met(chip: Chip, shape: tuple[int, int, int]) -> None:
    assert reached(chip, *shape) == pytest.approx(measured(*shape), rel=1e-3)


@pytest.mark.parametrize("shape", [(1000, 3000, 500), (4096, 4096, 4096), (57344, 14336, 2048), (128, 128, 128)])
def test_an_efficiency_between_and_beyond_the_table_follows_the_shape(chip: Chip, shape: tuple[int, int, int]) -> None:
    assert reached(chip, *shape) == pytest.approx(measured(*shape), rel=0.02)


def test_an_entry_that_no_smooth_form_explains_is_met_and_felt_around(chip: Chip) -> None:
    odd = replace(chip, efficiency={"bfloat16": (*TABLE, ShapeEfficiency(4096, 8192, 4096, 0.3))})
    assert reached(odd, 4096, 8192, 4096) == pytest.approx(0.3, rel=1e-3)
    assert 0.3 < reached(odd, 4096, 8192, 5000) < measured(4096, 8192, 5000)
    assert reached(odd, 256, 512, 64) == pytest.approx(measured(256, 512, 64), rel=1e-3)


@pytest.fixture
def gpu(chip: Chip) -> Chip:
    """A GPU with 108 cores on which a single product was measured."""
    return replace(chip, cores=108, efficiency={"bfloat16": (ShapeEfficiency(8192, 8192, 8192, 0.75),)})


def test_cores_are_idle_in_the_last_round_of_tiles(gpu: Chip) -> None:
    full, more = 256 * 108, 256 * 109  # rows of tiles of 256 x 128
    assert reached(gpu, full, 128, 1000) > 1.4 * reached(gpu, more, 128, 1000)
    assert reached(gpu, 10 * full, 128, 1000) < 1.15 * reached(gpu, 10 * full + 256, 128, 1000)


def test_a_product_with_few_results_and_a_large_k_is_divided_among_cores(gpu: Chip) -> None:
    assert reached(gpu, 256, 256, 16384) > 2 * reached(gpu, 256, 256, 1024)


def test_no_product_is_faster_than_the_fastest_that_was_measured(gpu: Chip) -> None:
    slow_start = replace(gpu, efficiency={"bfloat16": (*gpu.efficiency["bfloat16"], ShapeEfficiency(8192, 8192, 64, 0.3))})
    assert reached(slow_start, 65536, 65536, 65536) == 0.75


def test_a_tile_that_is_not_full_takes_as_long_as_a_full_one(gpu: Chip) -> None:
    assert reached(gpu, 8192, 8192 + 8, 4096) < reached(gpu, 8192, 8192, 4096)
    assert reached(gpu, 8192, 16, 4096) < reached(gpu, 8192, 64, 4096) / 3


def test_attention_is_slower_than_a_product_of_its_size(chip: Chip) -> None:
    shape, flops = (2, 8, 4096, 128), 2 * 2 * 16 * 4096 * 2048 * 128
    fused = operator("aten._scaled_dot_product_flash_attention.default", [shape, shape, shape], shape, flops)
    speed = rate(chip, Product(16, 4096, 128, 2048, "bfloat16")) * FUSED_ATTENTION
    assert operator_seconds(chip, fused) == pytest.approx(flops / speed)


def test_attention_over_an_odd_number_of_tokens_takes_hardly_longer(chip: Chip) -> None:
    def seconds(tokens: int) -> float:
        shape = (2, 8, tokens, 128)
        return operator_seconds(
            chip, operator("aten._scaled_dot_product_flash_attention.default", [shape] * 3, shape, 2 * 16 * tokens * tokens * 128)
        )

    assert seconds(4088) == pytest.approx(seconds(4096), rel=0.05)


def test_a_kernel_reaches_a_part_of_the_bandwidth(chip: Chip) -> None:
    added = operator("aten.add.Tensor", [(8192, 8192), (8192, 8192)], (8192, 8192))
    slower = replace(chip, memory_fraction=0.5)
    assert operator_seconds(slower, added) == pytest.approx(2 * operator_seconds(chip, added))


def test_a_product_takes_its_flops_by_what_it_reaches_of_the_peak(chip: Chip) -> None:
    m, n, k = 8192, 4096, 16384
    assert operator_seconds(chip, product(m, n, k)) == pytest.approx(2 * m * n * k / 3.12e14 / measured(m, n, k), rel=1e-3)


def test_a_batch_of_products_fills_the_chip_as_one_larger_does(chip: Chip) -> None:
    one, many = Product(1, 512, 512, 1024, "bfloat16"), Product(32, 512, 512, 1024, "bfloat16")
    assert rate(chip, many) > 4 * rate(chip, one)
    assert rate(chip, many) == rate(chip, Product(1, 32 * 512, 512, 1024, "bfloat16"))


def test_the_bytes_count_where_they_take_longer(chip: Chip) -> None:
    added = operator("aten.add.Tensor", [(8192, 8192), (8192, 8192)], (8192, 8192))
    assert operator_seconds(chip, added) == pytest.approx(3 * 2 * 8192**2 / chip.memory_bytes_per_second)
    thin = product(16384, 16384, 8)
    assert operator_seconds(chip, thin) >= thin.written_bytes / chip.memory_bytes_per_second


def test_nothing_is_faster_than_its_launch(chip: Chip) -> None:
    assert operator_seconds(chip, operator("aten.add.Tensor", [(8,), (8,)], (8,))) == chip.launch_seconds


def test_rows_that_are_looked_up_are_read_alone(chip: Chip) -> None:
    looked_up = operator("aten.embedding.default", [(250880, 14336), (2048,)], (2048, 14336))
    assert operator_seconds(chip, looked_up) == pytest.approx(2 * 2 * 2048 * 14336 / chip.memory_bytes_per_second)


@pytest.mark.parametrize(
    ("name", "inputs", "found"),
    [
        ("aten.mm.default", [(64, 32), (32, 16)], (1, 64, 16, 32)),
        ("aten.addmm_.default", [(64, 16), (64, 32), (32, 16)], (1, 64, 16, 32)),
        ("aten.addmm.default", [(16,), (64, 32), (32, 16)], (1, 64, 16, 32)),
        ("aten.bmm.default", [(8, 64, 32), (8, 32, 16)], (8, 64, 16, 32)),
        ("aten.baddbmm.default", [(8, 64, 16), (8, 64, 32), (8, 32, 16)], (8, 64, 16, 32)),
        ("aten._grouped_mm.default", [(64, 32), (4, 32, 16), (4,)], (4, 16, 16, 32)),
        ("aten._scaled_dot_product_flash_attention.default", [(2, 4, 64, 16), (2, 1, 64, 16), (2, 1, 64, 16)], (8, 64, 16, 32)),
        (
            "aten._scaled_dot_product_flash_attention_backward.default",
            [(2, 4, 64, 16), (2, 4, 64, 16), (2, 1, 64, 16), (2, 1, 64, 16), (2, 4, 64, 16), (2, 4, 64)],
            (8, 64, 16, 32),
        ),
    ],
)
def test_the_product_of_an_operator(name: str, inputs: list[tuple[int, ...]], found: tuple[int, ...]) -> None:
    assert product_of(operator(name, inputs, (1,))) == Product(*found, "bfloat16")


def test_rows_that_are_not_whole_loads_do_without_matrix_units(chip: Chip) -> None:
    aligned, odd = Product(64, 2048, 2048, 112, "bfloat16"), Product(64, 2048, 2048, 108, "bfloat16")
    assert rate(chip, odd) < rate(chip, aligned) / 10
    assert rate(replace(chip, vendor="other"), odd) > rate(replace(chip, vendor="other"), aligned) * 0.9


def test_the_other_dtype_of_16_bits_stands_in_for_one_without_a_table(chip: Chip) -> None:
    half = Product(1, 4096, 4096, 1024, "float16")
    assert rate(chip, half) == rate(chip, replace(half, dtype="bfloat16"))


def test_a_dtype_that_the_chip_does_not_multiply_is_refused(chip: Chip) -> None:
    with pytest.raises(RecipeError, match=r"float8: no matmul peak is known for A100"):
        operator_seconds(
            chip, operator("aten._scaled_mm.default", [(64, 32), (32, 16)], (64, 16), 2 * 64 * 32 * 16, "float8_e4m3fn")
        )

"""Products in float8: they are those of the rounded matrices, what is not finite stays so, and mistakes are found out."""

from collections.abc import Callable
from dataclasses import replace
from importlib.metadata import EntryPoint
from typing import Any

import pytest
import torch

from bagualu.comm.errors import RecipeError
from bagualu.parallel.pipeline.layer_slice import LayerSlice
from bagualu.parallel.products import Products, torch_products
from bagualu.trainer.costs.operator_times import measurable
from bagualu.trainer.models.decoder.config import ModelConfig
from bagualu.trainer.models.decoder.model import Decoder, Head
from bagualu.trainer.operators import float8, registry
from bagualu.trainer.operators.config import OperatorsConfig
from bagualu.trainer.operators.float8 import ProductsInFloat8, Scaled, float8_rowwise, float8_tensorwise
from bagualu.trainer.operators.operator_set import OperatorSet, variant_of
from tests.trainer.operators.conformance import MANTISSA_BITS, check, draw

BOTH = pytest.mark.parametrize("products", [float8_rowwise, float8_tensorwise], ids=["rowwise", "tensorwise"])
LARGEST = {torch.float8_e4m3fn: 448.0, torch.float8_e5m2: 57344.0}
LEAST_EXPONENT = {torch.float8_e4m3fn: -6, torch.float8_e5m2: -14}
SUMS = 1e-6
"""The largest error of a sum in float32 of up to some hundred products, relative to the Euclidean norm of the result."""


def rounded(x: torch.Tensor, dtype: torch.dtype, by_row: bool) -> torch.Tensor:
    """x [A, K] in float64, rounded to `dtype` under its scales, by arithmetic that knows of no float8."""
    x = x.float()
    highest = x.abs().amax(1, keepdim=True) if by_row else x.abs().max()
    scale = highest / LARGEST[dtype]
    shrunk = (x / scale).double()
    exponents = shrunk.abs().clamp(min=1e-300).log2().floor().clamp(min=LEAST_EXPONENT[dtype])
    bit = torch.exp2(exponents - MANTISSA_BITS[dtype])
    return (shrunk / bit).round() * bit * scale.double()  # round() takes the even one of two that are as near


def matrices(rows: int, inputs: int, outputs: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Rows [N, I], weight [O, I] and columns [N, O] in bfloat16; rows of each differ in size."""
    drawn = draw(rows, inputs), draw(outputs, inputs, seed=1), draw(rows, outputs, seed=2)
    return tuple((x * torch.logspace(-3, 3, len(x), 2.0).unsqueeze(1)).bfloat16() for x in drawn)  # type: ignore[return-value]


@BOTH
@pytest.mark.parametrize("sizes", [(48, 32, 64), (77, 96, 32), (1, 16, 16)], ids=str)
def test_a_product_is_that_of_the_rounded_matrices(products: ProductsInFloat8, sizes: tuple[int, int, int]) -> None:
    x, weight, columns = matrices(*sizes)
    by_row, narrow = products is float8_rowwise, torch.float8_e4m3fn
    total, before = torch.ones(sizes[2], sizes[1]), torch.ones(sizes[2], sizes[1], dtype=torch.float64)
    products.add_weight_gradient(total, columns, x, fresh=False)
    of_gradients = products.of_gradients
    left, right = (rounded(one.T, dtype, by_row) for one, dtype in ((columns, of_gradients), (x, narrow)))
    for found, expected in (
        (products.outputs(x, weight, dtype=torch.float32), rounded(x, narrow, by_row) @ rounded(weight, narrow, by_row).T),
        (
            products.plus_input_gradient(None, columns.float(), weight),
            rounded(columns, of_gradients, by_row) @ rounded(weight.T, narrow, by_row).T,
        ),
        (total, before + left @ right.T),
    ):
        assert found.dtype == torch.float32
        assert (found - expected).norm() <= SUMS * expected.norm()


@BOTH
def test_gradients_have_the_format_that_suits_the_scales(products: ProductsInFloat8) -> None:
    assert products.of_gradients == (torch.float8_e4m3fn if products is float8_rowwise else torch.float8_e5m2)


@BOTH
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_stays_so(products: ProductsInFloat8, bad: float) -> None:
    x, weight, columns = matrices(20, 32, 48)
    x[3, 5], columns[4, 6] = bad, bad
    total = torch.zeros(48, 32)
    products.add_weight_gradient(total, columns, x, fresh=True)
    output, gradient = products.outputs(x, weight), products.plus_input_gradient(None, columns, weight)
    assert not output[3].isfinite().any()
    assert not gradient[4].isfinite().any()
    assert not total[6].isfinite().any()
    assert not total[:, 5].isfinite().any()
    if products is float8_rowwise:
        assert output[[0, 1, 2, *range(4, 20)]].isfinite().all(), "other rows have scales of their own"


@BOTH
def test_zeros_and_the_least_and_largest_numbers_have_a_product(products: ProductsInFloat8) -> None:
    x, weight, columns = matrices(20, 32, 48)
    assert products.outputs(torch.zeros_like(x), weight).count_nonzero() == 0
    assert products.plus_input_gradient(None, torch.zeros_like(columns), weight).count_nonzero() == 0
    least, largest = torch.full_like(x, 1e-40), torch.full_like(x, 3e38)
    ones = torch.ones_like(weight)
    assert products.outputs(least, ones).isfinite().all()
    assert torch.equal(products.outputs(largest, ones * 2**-10), torch.full((20, 48), 32 * 3e38 * 2**-10).bfloat16())


def test_scales_of_rows_keep_tokens_apart() -> None:
    x, weight, _ = matrices(20, 32, 48)
    few, other = x[:7], x.clone()
    other[7:] *= 1000
    assert torch.equal(float8_rowwise.outputs(other, weight)[:7], float8_rowwise.outputs(few, weight))
    assert not torch.equal(float8_tensorwise.outputs(other, weight)[:7], float8_tensorwise.outputs(few, weight))


def test_an_operand_is_converted_once_for_the_products_of_a_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[tuple[int, ...]] = []
    plain = float8.scaled
    monkeypatch.setattr(float8, "scaled", lambda x, *given: made.append(tuple(x.shape)) or plain(x, *given))
    x, weight, columns = matrices(16, 32, 48)
    operand = float8_rowwise.operand(x, torch.bfloat16)
    for _ in range(3):
        float8_rowwise.outputs(operand, weight)
        float8_rowwise.add_weight_gradient(torch.zeros(48, 32), columns, operand, fresh=True)
    assert [made.count(shape) for shape in ((16, 32), (32, 16), (48, 32), (48, 16))] == [1, 1, 3, 3]
    assert not hasattr(x, "float8"), "what a layer saves for its backward pass would keep the copies"


def test_the_head_keeps_the_usual_products() -> None:
    model = ModelConfig(layers=1, hidden=32, heads=2, kv_heads=2, ffn=32, vocab=64)
    with torch.device("meta"):
        decoder = Decoder(model, [LayerSlice.of_layers(range(1))], operators=OperatorSet(linear=float8_rowwise))
    assert isinstance(decoder.head, Head)
    assert decoder.head.loss.keywords["products"] is torch_products
    assert decoder.layers["0"].attention.query.products is float8_rowwise


@pytest.mark.parametrize("variant", ["float8_rowwise", "float8_tensorwise"])
@pytest.mark.parametrize("capability", [(8, 0), (8, 6), (8, 9), (9, 0), (12, 0)])
def test_a_gpu_without_float8_is_refused(monkeypatch: pytest.MonkeyPatch, variant: str, capability: tuple[int, int]) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: capability)
    monkeypatch.setattr(torch.version, "hip", None)
    if capability >= (8, 9):
        assert isinstance(variant_of("linear", variant, "cuda"), ProductsInFloat8)
        return
    with pytest.raises(RecipeError) as error:
        variant_of("linear", variant, "cuda")
    (line,) = str(error.value).splitlines()
    assert line.startswith(f"operators.linear={variant} needs a GPU that multiplies float8 (NVIDIA's of compute capability 8.9")
    assert line.endswith("provide it, or give train.dtype=bfloat16")
    assert isinstance(variant_of("linear", variant, "cuda", here=False), ProductsInFloat8), "it can be predicted elsewhere"
    assert isinstance(variant_of("linear", variant, "cpu"), ProductsInFloat8), "such a machine's CPU has it"


@pytest.mark.parametrize(("name", "refused"), [("gfx90a:sramecc+", True), ("gfx942:sramecc+", True), ("gfx950:sramecc+", False)])
def test_so_is_an_amd_gpu_without_these_formats(monkeypatch: pytest.MonkeyPatch, name: str, refused: bool) -> None:
    class Properties:
        gcnArchName = name

    monkeypatch.setattr(torch.version, "hip", "7.0")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda *_: Properties)
    assert (float8_rowwise.lacks_on("cuda") is not None) == refused


@pytest.mark.parametrize("chip", ["npu", "xpu", "mps", "hpu"])
def test_another_chip_is_refused_unless_it_multiplies(monkeypatch: pytest.MonkeyPatch, chip: str) -> None:
    with pytest.raises(RecipeError) as error:
        variant_of("linear", "float8_rowwise", chip)
    (line,) = str(error.value).splitlines()
    assert line.startswith(f"operators.linear=float8_rowwise needs products in float8 on the chip {chip} (")
    assert line.endswith("provide it, or give train.dtype=bfloat16")
    plain = torch.ones
    monkeypatch.setattr(torch, "ones", lambda *sizes, device, **named: plain(*sizes, **named))
    assert isinstance(variant_of("linear", "float8_rowwise", chip), ProductsInFloat8), "such a chip multiplies as the CPU does"


def test_a_registered_variant_is_for_float8_by_its_name(monkeypatch: pytest.MonkeyPatch) -> None:
    mine = EntryPoint("linear.float8_mine.npu", "bagualu.trainer.operators.float8:float8_rowwise", registry.GROUP)
    monkeypatch.setattr(registry, "entry_points", lambda group: [mine])
    config = OperatorsConfig(linear="float8_mine")
    config.validate("npu", "float8")
    assert config.in_float8() == config
    with pytest.raises(RecipeError, match=r"operators\.linear=float8_mine is for train\.dtype=float8"):
        config.validate("npu", "bfloat16")
    assert "float8_mine" in registry.variants("linear", "npu")
    assert "float8_mine" not in measurable("linear", "npu"), "it is never chosen by its time"


Change = Callable[[Scaled, torch.Tensor], Scaled]


def forgets_the_scale(made: Scaled, x: torch.Tensor) -> Scaled:
    return replace(made, scale=torch.ones_like(made.scale))


def has_the_scale_of_another_row(made: Scaled, x: torch.Tensor) -> Scaled:
    return replace(made, scale=made.scale.roll(1, 0) if made.scale.dim() else made.scale * 1.1)


def reads_columns_as_rows(made: Scaled, x: torch.Tensor) -> Scaled:
    return replace(made, values=made.values.T.reshape(made.values.shape))


def leaves_the_remainder_as_it_was(made: Scaled, x: torch.Tensor) -> Scaled:
    made.values[:, x.shape[1] :] = torch.finfo(made.values.dtype).max
    return made


def clips(made: Scaled, x: torch.Tensor) -> Scaled:
    return replace(made, values=made.values.float().clamp(-20, 20).to(made.values.dtype))


@BOTH
@pytest.mark.parametrize(
    "wrong",
    [forgets_the_scale, has_the_scale_of_another_row, reads_columns_as_rows, leaves_the_remainder_as_it_was, clips],
    ids=lambda wrong: wrong.__name__,
)
def test_a_mistake_exceeds_the_tolerance(monkeypatch: pytest.MonkeyPatch, products: Products, wrong: Change) -> None:
    check("linear", products, torch.bfloat16, torch.device("cpu"))
    plain: Any = float8.scaled
    monkeypatch.setattr(float8, "scaled", lambda x, *given: wrong(plain(x, *given), x))
    with pytest.raises(AssertionError, match="is wrong"):
        check("linear", products, torch.bfloat16, torch.device("cpu"))


def test_so_do_gradients_added_to_old_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    class AddsToOldGradients(ProductsInFloat8):
        def add_weight_gradient(self, total: Any, columns: Any, rows: Any, fresh: bool) -> None:
            super().add_weight_gradient(total, columns, rows, fresh=False)

    with pytest.raises(AssertionError, match="gradient of a weight, fresh: True is wrong"):
        check("linear", AddsToOldGradients(by_row=True), torch.bfloat16, torch.device("cpu"))

"""Products in tiles are those of torch, for all shapes and wherever their operands lie; test_conformance.py checks their values."""

import logging
from pathlib import Path
from typing import Any

import pytest
import torch

from bagualu.comm.errors import RecipeError
from bagualu.parallel.products import Products, torch_products
from bagualu.trainer.costs.choose_operators import choose_operators
from bagualu.trainer.costs.operator_cases import LinearShape, OperatorCalls
from bagualu.trainer.costs.operator_times import measure
from bagualu.trainer.operators import operator_set
from bagualu.trainer.operators.products import ProductsInTiles, products_in_tiles
from tests.harness import run
from tests.parity import small_recipe, train

can = pytest.mark.skipif(products_in_tiles.lacks() is not None, reason=f"products in tiles need {products_in_tiles.lacks()}")


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).bfloat16()


def results(products: Products, x: torch.Tensor, weight: torch.Tensor, columns: torch.Tensor) -> list[torch.Tensor]:
    total = torch.ones(weight.shape)
    products.add_weight_gradient(total, columns, x, fresh=False)
    return [products.outputs(x, weight), products.plus_input_gradient(None, columns, weight), total]


@pytest.fixture
def kernels(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the kernels that are called."""
    called: list[str] = []
    before = ProductsInTiles.run
    monkeypatch.setattr(ProductsInTiles, "run", lambda self, kernel, *given: called.append(kernel) or before(self, kernel, *given))
    return called


ALL = ["weight_gradient", "linear_outputs", "input_gradient"]


@can
@pytest.mark.parametrize(("tokens", "inputs", "outputs"), [(300, 96, 160), (64, 96, 320), (2500, 64, 32)])
def test_results_are_the_same_for_any_number_of_threads_and_each_row_for_any_others(
    tokens: int, inputs: int, outputs: int, kernels: list[str]
) -> None:
    given, threads = (draw(tokens, inputs), draw(outputs, inputs), draw(tokens, outputs)), torch.get_num_threads()
    first = results(products_in_tiles, *given)
    assert kernels == ALL
    try:
        for count in (1, 3, threads):
            torch.set_num_threads(count)
            assert all(torch.equal(x, y) for x, y in zip(results(products_in_tiles, *given), first, strict=True))
    finally:
        torch.set_num_threads(threads)
    part = results(products_in_tiles, given[0][:50], given[1], given[2][:50])
    assert all(torch.equal(x, y[:50]) for x, y in zip(part[:2], first[:2], strict=True))


@can
def test_operands_are_read_where_they_lie(kernels: list[str]) -> None:
    x, weight, columns = draw(70, 64), draw(96, 64), draw(70, 96)
    expected = results(products_in_tiles, x, weight, columns)
    wider = [torch.cat((one, one), 1)[:, : one.shape[1]] for one in (x, weight, columns)]
    strided = [torch.stack((x, -x), -1)[..., 0], weight, torch.stack((columns, -columns), -1)[..., 0]]
    for others in (wider, strided):
        assert all(torch.equal(a, b) for a, b in zip(results(products_in_tiles, *others), expected, strict=True))
    assert kernels[: 2 * len(ALL)] == ALL * 2
    row = columns[:1].expand(70, 96)
    once, again = (products_in_tiles.plus_input_gradient(None, one, weight) for one in (row, row.contiguous()))
    assert torch.equal(once, again)


@can
def test_what_they_do_not_compute_is_torchs(kernels: list[str]) -> None:
    x, weight, columns = draw(70, 64), draw(96, 64), draw(70, 96)
    odd = [x, draw(90, 64), columns[:, :90]]
    for given in ([x[:31], weight, columns[:31]], odd, [one.float() for one in (x, weight, columns)],
                  [one.half() for one in (x, weight, columns)]):  # fmt: skip
        found, expected = results(products_in_tiles, *given), results(torch_products, *given)
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    assert not kernels
    assert products_in_tiles.outputs(x.to("meta"), weight.to("meta")).device.type == "meta"
    products_in_tiles.add_weight_gradient(torch.zeros(64, 96).T, columns, x, fresh=True)
    assert not kernels


@can
def test_what_is_no_number_is_not_hidden(kernels: list[str]) -> None:
    x, weight, columns = draw(70, 64), draw(96, 64), draw(70, 96)
    x[3, 5], columns[4, 6] = torch.nan, torch.inf
    output, gradient, total = results(products_in_tiles, x, weight, columns)
    assert output[3].isnan().all()
    assert not gradient[4].isfinite().any()
    assert total[:, 5].isnan().all()
    assert not total[6].isfinite().any()
    assert output[:3].isfinite().all()
    assert kernels == ALL


def test_a_compiler_that_fails_is_said_once_and_torch_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("CXX", "no-such-compiler")
    given = draw(70, 64), draw(96, 64), draw(70, 96)
    broken = ProductsInTiles()
    with caplog.at_level(logging.WARNING):
        _, found = (results(broken, *given) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(found, results(torch_products, *given), strict=True))
    assert [record.getMessage() for record in caplog.records] == [
        "linear layers in tiles cannot be compiled (there is no C++ compiler); torch's kernel takes its place"
    ]


MIXTURE = {"model__moe__experts": 2, "model__moe__top_k": 1, "model__moe__ffn": 64, "model__bias": "all"}


@can
@pytest.mark.parametrize("changes", [{}, MIXTURE], ids=["dense", "mixture"])
def test_a_model_trains_with_them_in_every_linear_layer(changes: dict[str, object], kernels: list[str]) -> None:
    model = {"model__hidden": 64, "model__ffn": 96, "model__vocab": 128, "train__dtype": "bfloat16", "data__sequence_length": 64,
             "comm__backend": "simulated", **changes}  # fmt: skip
    found, expected = (
        run("simulated", 2, train, small_recipe(**model, parallel__tensor=2, operators__linear=variant), 2)
        for variant in ("tiles", "torch")
    )
    assert set(kernels) == set(ALL)
    for one, other in zip(found, expected, strict=True):
        assert one.losses != other.losses, "torch computed both"
        torch.testing.assert_close(torch.tensor(one.losses), torch.tensor(other.losses), rtol=2e-3, atol=0)


@can
def test_they_are_measured_where_products_take_long(tmp_path: Path) -> None:
    large: dict[str, object] = {"model__hidden": 512, "model__ffn": 512, "data__sequence_length": 512, "train__dtype": "bfloat16"}
    folders: dict[str, object] = {"run__dir": str(tmp_path / "run"), "data__cache": str(tmp_path / "cache")}
    recipe = small_recipe(comm__backend="gloo", **large, **folders)
    ((chosen, _),) = run("gloo", 1, choose, recipe)
    assert chosen.operators["linear"].seconds.keys() == {"tiles", "torch"}


@can
def test_where_they_leave_the_product_to_torch_they_are_not_measured(kernels: list[str]) -> None:
    cases = [OperatorCalls("linear", LinearShape(*sizes), dtype, 1, 1.0) for *sizes, dtype in (
        (64, 64, 64, "float32"), (31, 64, 64, "bfloat16"), (64, 64, 72, "bfloat16"))]  # fmt: skip
    both: dict[str, Any] = {"tiles": products_in_tiles, "torch": torch_products}
    for case in cases:
        times = measure(case.prepare(torch.device("cpu")), both, "torch", torch.device("cpu"), budget_seconds=0)
        assert times["tiles"] == times["torch"]
    assert not kernels


def test_what_is_no_such_object_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(operator_set, "load_variant", lambda *named: print)
    with pytest.raises(RecipeError, match=r"operators.linear=odd is registered as .*; it must be an object of the class bagualu"):
        operator_set.variant_of("linear", "odd", "cpu")


def choose(communicator: object, recipe: object) -> object:
    return choose_operators(recipe, communicator)  # type: ignore[arg-type]

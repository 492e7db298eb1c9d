"""Products in tiles and in panels are those of torch, for all shapes and wherever their operands lie; test_conformance.py checks
their values."""

import logging
from pathlib import Path
from typing import Any

import pytest
import torch

from bagualu.comm.errors import RecipeError
from bagualu.parallel import precision
from bagualu.parallel.products import Products, torch_products
from bagualu.trainer.costs.choose_operators import choose_operators
from bagualu.trainer.costs.operator_cases import LinearShape, OperatorCalls
from bagualu.trainer.costs.operator_times import measure
from bagualu.trainer.operators import operator_set
from bagualu.trainer.operators.cpp_kernels import CppKernels
from bagualu.trainer.operators.panels import ProductsInPanels, products_in_panels
from bagualu.trainer.operators.products import ProductsInTiles, products_in_tiles
from tests.harness import run
from tests.parity import small_recipe, train


def _case(own: Any, name: str) -> Any:
    lacked = own.lacks()
    return pytest.param(own, id=name, marks=[pytest.mark.skipif(lacked is not None, reason=f"products in {name} need {lacked}")])


TILES, PANELS = _case(products_in_tiles, "tiles"), _case(products_in_panels, "panels")
both = pytest.mark.parametrize("own", [TILES, PANELS])
tiles = pytest.mark.parametrize("own", [TILES])
panels = pytest.mark.parametrize("own", [PANELS])


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
    before = CppKernels.run
    monkeypatch.setattr(CppKernels, "run", lambda self, kernel, *given: called.append(kernel) or before(self, kernel, *given))
    return called


ALL = ["weight_gradient", "linear_outputs", "input_gradient"]


@both
@pytest.mark.parametrize(("tokens", "inputs", "outputs"), [(300, 96, 160), (64, 96, 320), (2500, 64, 32)])
def test_results_are_the_same_for_any_number_of_threads_and_each_row_for_any_others(
    own: Products, tokens: int, inputs: int, outputs: int, kernels: list[str]
) -> None:
    given, threads = (draw(tokens, inputs), draw(outputs, inputs), draw(tokens, outputs)), torch.get_num_threads()
    first = results(own, *given)
    assert kernels == ALL
    try:
        for count in (1, 3, threads):
            torch.set_num_threads(count)
            assert all(torch.equal(x, y) for x, y in zip(results(own, *given), first, strict=True))
    finally:
        torch.set_num_threads(threads)
    part = results(own, given[0][:50], given[1], given[2][:50])
    assert all(torch.equal(x, y[:50]) for x, y in zip(part[:2], first[:2], strict=True))


@both
def test_operands_are_read_where_they_lie(own: Products, kernels: list[str]) -> None:
    x, weight, columns = draw(70, 64), draw(96, 64), draw(70, 96)
    expected = results(own, x, weight, columns)
    wider = [torch.cat((one, one), 1)[:, : one.shape[1]] for one in (x, weight, columns)]
    strided = [torch.stack((x, -x), -1)[..., 0], weight, torch.stack((columns, -columns), -1)[..., 0]]
    for others in (wider, strided):
        assert all(torch.equal(a, b) for a, b in zip(results(own, *others), expected, strict=True))
    assert kernels[: 2 * len(ALL)] == ALL * 2
    row = columns[:1].expand(70, 96)
    once, again = (own.plus_input_gradient(None, one, weight) for one in (row, row.contiguous()))
    assert torch.equal(once, again)


@tiles
def test_what_tiles_do_not_compute_is_torchs(own: Products, kernels: list[str]) -> None:
    x, weight, columns = draw(70, 64), draw(96, 64), draw(70, 96)
    odd = [x, draw(90, 64), columns[:, :90]]
    for given in ([x[:31], weight, columns[:31]], odd, [one.float() for one in (x, weight, columns)],
                  [one.half() for one in (x, weight, columns)]):  # fmt: skip
        found, expected = results(own, *given), results(torch_products, *given)
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    assert not kernels
    assert own.outputs(x.to("meta"), weight.to("meta")).device.type == "meta"
    own.add_weight_gradient(torch.zeros(64, 96).T, columns, x, fresh=True)
    assert not kernels


@panels
def test_panels_read_and_write_each_dtype(own: Products, kernels: list[str]) -> None:
    wide = draw(70, 61).float(), draw(90, 61).float(), draw(70, 90).float()
    expected = results(own, *wide)
    for narrow in range(8):
        given = [one.bfloat16() if narrow & 1 << index else one for index, one in enumerate(wide)]
        assert all(own.operand(one, torch.float32) is one for one in given)
        x, weight, columns = given
        total = torch.ones(weight.shape)
        own.add_weight_gradient(total, columns, x, fresh=False)
        assert torch.equal(total, expected[2])
        for dtype in (torch.float32, torch.bfloat16):
            assert torch.equal(own.outputs(x, weight, dtype=dtype), expected[0].to(dtype))
            into = torch.empty(70, 61, dtype=dtype)
            assert torch.equal(own.plus_input_gradient(None, columns, weight, into=into), expected[1].to(dtype))
            before = torch.ones(70, 61, dtype=dtype)
            assert torch.equal(own.plus_input_gradient(before, columns, weight), (expected[1] + 1).to(dtype))
    assert len(kernels) == 3 + 8 * 7


@panels
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="Linux tells how much memory was used at the most")
def test_panels_hold_no_copy_of_a_large_weight(own: Products) -> None:
    """Nor of one with few inputs, for which many sums are held."""

    def most_bytes(line: str) -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return 1024 * int(next(one for one in lines if one.startswith(line)).split()[1])

    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        for rows, inputs, outputs, most in ((384, 64, 2**15, 20), (8, 2048, 2**14, 24)):  # a copy of the second takes 128 MiB
            x, weight = draw(rows, inputs), draw(outputs, inputs)
            into = torch.zeros(rows, outputs, dtype=torch.bfloat16)  # no call before it, whose memory this one could use again
            Path("/proc/self/clear_refs").write_text("5")  # forgets what was the most so far
            before = most_bytes("VmRSS")
            own.outputs(x, weight, into=into)
            assert most_bytes("VmHWM") - before < most * 2**20
    finally:
        torch.set_num_threads(threads)


def test_panels_are_measured_where_torch_has_no_wider_instructions(monkeypatch: pytest.MonkeyPatch) -> None:
    for multiplies, wide, computed in ((False, False, {"float32", "bfloat16"}), (False, True, {"bfloat16"}), (True, True, set())):
        monkeypatch.setattr(precision, "_CPU_MULTIPLIES", {torch.bfloat16: multiplies, torch.float16: False})
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda wide=wide: {"avx512_f": wide})
        dtypes = ("float64", "float32", "bfloat16", "float16")
        assert {dtype for dtype in dtypes if products_in_panels.computes(getattr(torch, dtype), 8, 64, 64)} == computed
        assert not products_in_panels.computes(torch.bfloat16, 7, 64, 64), "packing takes longer than the product"


@panels
def test_what_panels_do_not_compute_is_torchs(own: Products, kernels: list[str]) -> None:
    x, weight, columns = draw(70, 64), draw(96, 64), draw(70, 96)
    for given in ([x[:0], weight, columns[:0]], [x, weight[:0], columns[:, :0]],
                  *([one.to(dtype) for one in (x, weight, columns)] for dtype in (torch.float64, torch.float16))):  # fmt: skip
        found, expected = results(own, *given), results(torch_products, *given)
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    assert own.operand(x.double(), torch.float64).dtype == torch.float64
    assert own.operand(x.half(), torch.float32).dtype == torch.float32
    assert own.operand(x.to("meta"), torch.float32).dtype == torch.float32, "as the simulator's chip would"
    assert not kernels


@both
def test_what_is_no_number_is_not_hidden(own: Products, kernels: list[str]) -> None:
    x, weight, columns = draw(70, 64), draw(96, 64), draw(70, 96)
    x[3, 5], columns[4, 6] = torch.nan, torch.inf
    output, gradient, total = results(own, x, weight, columns)
    assert output[3].isnan().all()
    assert not gradient[4].isfinite().any()
    assert total[:, 5].isnan().all()
    assert not total[6].isfinite().any()
    assert output[:3].isfinite().all()
    assert kernels == ALL


@pytest.mark.parametrize("kind", [ProductsInTiles, ProductsInPanels])
def test_a_compiler_that_fails_is_said_once_and_torch_goes_on(
    kind: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("CXX", "no-such-compiler")
    given = draw(70, 64), draw(96, 64), draw(70, 96)
    broken = kind()
    with caplog.at_level(logging.WARNING):
        _, found = (results(broken, *given) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(found, results(torch_products, *given), strict=True))
    assert [record.getMessage() for record in caplog.records] == [
        f"{kind.name} cannot be compiled (there is no C++ compiler); torch's kernel takes its place"
    ]
    assert broken.operand(given[0], torch.float32).dtype == torch.float32, "no kernel reads bfloat16 then"


MIXTURE = {"model__moe__experts": 2, "model__moe__top_k": 1, "model__moe__ffn": 64, "model__bias": "all"}


@both
@pytest.mark.parametrize("changes", [{}, MIXTURE], ids=["dense", "mixture"])
def test_a_model_trains_with_them_in_every_linear_layer(own: CppKernels, changes: dict[str, object], kernels: list[str]) -> None:
    model = {"model__hidden": 64, "model__ffn": 96, "model__vocab": 128, "train__dtype": "bfloat16", "data__sequence_length": 64,
             "comm__backend": "simulated", **changes}  # fmt: skip
    found, expected = (
        run("simulated", 2, train, small_recipe(**model, parallel__tensor=2, operators__linear=variant), 2)
        for variant in ("tiles" if own is products_in_tiles else "panels", "torch")
    )
    assert set(kernels) == set(ALL)
    for one, other in zip(found, expected, strict=True):
        assert one.losses != other.losses, "torch computed both"
        torch.testing.assert_close(torch.tensor(one.losses), torch.tensor(other.losses), rtol=2e-3, atol=0)


def test_they_are_measured_where_products_take_long(tmp_path: Path) -> None:
    large: dict[str, object] = {"model__hidden": 512, "model__ffn": 512, "data__sequence_length": 512, "train__dtype": "bfloat16"}
    folders: dict[str, object] = {"run__dir": str(tmp_path / "run"), "data__cache": str(tmp_path / "cache")}
    recipe = small_recipe(comm__backend="gloo", **large, **folders)
    ((chosen, _),) = run("gloo", 1, choose, recipe)
    usable = {name for name, own in (("tiles", products_in_tiles), ("panels", products_in_panels)) if own.lacks() is None}
    assert chosen.operators["linear"].seconds.keys() == ({"torch", *usable} if usable else set())


@tiles
def test_where_they_leave_the_product_to_torch_they_are_not_measured(own: Products, kernels: list[str]) -> None:
    cases = [OperatorCalls("linear", LinearShape(*sizes), dtype, 1, 1.0) for *sizes, dtype in (
        (64, 64, 64, "float32"), (31, 64, 64, "bfloat16"), (64, 64, 72, "bfloat16"))]  # fmt: skip
    rivals: dict[str, Any] = {"tiles": own, "torch": torch_products}
    for case in cases:
        times = measure(case.prepare(torch.device("cpu")), rivals, "torch", torch.device("cpu"), budget_seconds=0)
        assert times["tiles"] == times["torch"]
    assert not kernels


def test_what_is_no_such_object_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(operator_set, "load_variant", lambda *named: print)
    with pytest.raises(RecipeError, match=r"operators.linear=odd is registered as .*; it must be an object of the class bagualu"):
        operator_set.variant_of("linear", "odd", "cpu")


def choose(communicator: object, recipe: object) -> object:
    return choose_operators(recipe, communicator)  # type: ignore[arg-type]

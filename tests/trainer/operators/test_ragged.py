"""Padding of experts' rows: it changes no value and no gradient, and products meet few shapes."""

from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from bagualu.parallel import precision
from bagualu.parallel import product_shapes as shapes
from bagualu.trainer.models.decoder.config import ModelConfig, MoEConfig
from bagualu.trainer.models.decoder.moe import Experts
from bagualu.trainer.operators import ragged
from bagualu.trainer.operators.ragged import pad, unpad

COUNTS = [[5, 0, 64, 3], [0, 0, 0, 0], [64, 128, 64, 0], [1, 200, 63, 65]]


@pytest.fixture
def _padded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes `pad` add rows in every dtype, which it does by itself only in 16 bits and only on some CPUs."""
    monkeypatch.setattr(ragged, "generates_code", lambda rows: True)


class _Products(TorchDispatchMode):
    """Writes down the numbers of rows that matrix products are made of: those of their first matrix, and what they sum over."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func._schema.name in ("aten::mm", "aten::addmm_", "aten::addmm"):
            left, right = [one for one in args if isinstance(one, torch.Tensor)][-2:]
            self.seen |= {left.shape[0], left.shape[1], right.shape[1]}
        return func(*args, **(kwargs or {}))


def experts(gated: bool) -> Experts:
    config = ModelConfig(hidden=6, activation="swiglu" if gated else "gelu", moe=MoEConfig(experts=4, top_k=1, ffn=10))
    made = Experts(config).double()
    for index, parameter in enumerate(made.parameters()):
        torch.nn.init.normal_(parameter, generator=torch.Generator().manual_seed(index))
    return made


@pytest.mark.usefixtures("_padded")
@pytest.mark.parametrize("counts", COUNTS, ids=str)
def test_every_expert_gets_rows_of_a_multiple_and_gives_back_its_own(counts: list[int]) -> None:
    rows = torch.randn(sum(counts), 3, dtype=torch.float64, requires_grad=True)
    padded, numbers = pad(rows, counts)
    assert [number % 64 for number in numbers] == [0] * len(counts)
    assert [number - 64 < count <= number for number, count in zip(numbers, counts, strict=True)] == [True] * len(counts)
    for part, count, own in zip(padded.split(numbers), counts, rows.split(counts), strict=True):
        assert torch.equal(part[:count], own)
        assert not part[count:].any()
    assert torch.equal(unpad(padded, counts, numbers), rows)
    factors = torch.randn(rows.shape, dtype=rows.dtype)
    (gradient,) = torch.autograd.grad(unpad(padded, counts, numbers), rows, factors)
    assert torch.equal(gradient, factors)


@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("counts", COUNTS, ids=str)
def test_padding_changes_no_value_and_no_gradient(counts: list[int], gated: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    found = {}
    for generates in (False, True):
        monkeypatch.setattr(ragged, "generates_code", lambda rows, generates=generates: generates)
        layer = experts(gated)
        rows = torch.randn(sum(counts), 6, dtype=torch.float64, generator=torch.Generator().manual_seed(9)).requires_grad_()
        results = layer(rows, torch.tensor(counts))
        results.backward(torch.randn(results.shape, dtype=results.dtype, generator=torch.Generator().manual_seed(8)))
        found[generates] = [results, rows.grad, *(parameter.grad for parameter in layer.parameters())]
    for plain, padded in zip(found[False], found[True], strict=True):
        torch.testing.assert_close(padded, plain, rtol=1e-12, atol=1e-12)


@pytest.mark.usefixtures("_padded")
def test_loads_that_differ_need_products_of_the_same_shapes() -> None:
    layer, draw = experts(gated=True), torch.Generator().manual_seed(0)
    with _Products() as products:
        for _ in range(20):
            counts = torch.randint(65, 129, (4,), generator=draw)
            layer(torch.randn(int(counts.sum()), 6, dtype=torch.float64).requires_grad_(), counts).sum().backward()
    assert products.seen == {6, 10, 128}


def test_shapes_of_products_are_counted_once_and_stop_being_new(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(precision, "_CPU_MULTIPLIES", {torch.bfloat16: True})
    layer, draw, new = experts(gated=True).bfloat16(), torch.Generator().manual_seed(0), []
    monkeypatch.setattr(shapes, "_met", set())
    for _ in range(20):
        before, counts = shapes.met(), torch.randint(65, 129, (4,), generator=draw)
        layer(torch.randn(int(counts.sum()), 6, dtype=torch.bfloat16).requires_grad_(), counts).sum().backward()
        new.append(shapes.met() - before)
    assert new == [2] + [0] * 19  # of gate and up alike, and of down
    layer.double()(torch.randn(4, 6, dtype=torch.float64), torch.tensor([1, 1, 1, 1]))
    assert shapes.met() == 2, "in float64 no code is generated"


@pytest.mark.parametrize(
    ("dtype", "multiplies", "padded"),
    [(torch.bfloat16, True, True), (torch.bfloat16, False, False), (torch.float32, True, False)],
    ids=str,
)
def test_only_where_products_need_code_of_their_own_rows_are_padded(
    dtype: torch.dtype, multiplies: bool, padded: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(precision, "_CPU_MULTIPLIES", {torch.bfloat16: multiplies})
    rows = torch.ones(5, 3, dtype=dtype)
    assert pad(rows, [2, 3])[1] == ([64, 64] if padded else [2, 3])

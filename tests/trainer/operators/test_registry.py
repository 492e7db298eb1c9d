"""Variants are found by their entry points alone, and one that cannot be had is refused with those that can."""

import sys
from pathlib import Path

import pytest
import torch

from bagualu.comm.errors import RecipeError
from bagualu.trainer.costs.operator_times import measurable
from bagualu.trainer.operators import registry
from bagualu.trainer.operators.attention import attention_blocks, attention_kernel
from bagualu.trainer.operators.config import OperatorsConfig
from bagualu.trainer.operators.gate import silu_gate
from bagualu.trainer.operators.operator_set import BY_RULE, OperatorSet, operator_set
from bagualu.trainer.operators.registry import DEFAULT_VARIANTS, load_variant, variants

VENDOR = """
[bagualu.operators]
attention.flash = pulsar:missing
gate.wide.cpu = pulsar:wide
gate.narrow.npu = pulsar:narrow
norm.eager.npu = pulsar:norm
linear.float8_everywhere = pulsar:everywhere
gate.float8_like = pulsar:narrow
nothing.eager = pulsar:missing
"""
MODULE = """
from bagualu.parallel.products import Products

class Wide:
    def takes(self, gate, up):
        return gate.dtype == up.dtype
    def __call__(self, gate, up):
        return "wide", None

wide = Wide()

def narrow(gate, up):
    return "narrow", None

def norm(*given):
    return "norm"

everywhere = Products()
"""


@pytest.fixture
def _vendor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    about = tmp_path / "pulsar-1.0.dist-info"
    about.mkdir()
    (tmp_path / "pulsar.py").write_text(MODULE)
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: pulsar\nVersion: 1.0\n")
    (about / "entry_points.txt").write_text(VENDOR)
    monkeypatch.delitem(sys.modules, "pulsar", raising=False)  # of another test
    monkeypatch.syspath_prepend(tmp_path)


def test_every_operator_has_its_default_on_every_chip() -> None:
    assert OperatorsConfig().as_dict().keys() == DEFAULT_VARIANTS.keys() == vars(BY_RULE).keys()
    for operator, default in DEFAULT_VARIANTS.items():
        assert default in variants(operator, "any")
        assert not hasattr(load_variant(operator, default, "any"), "takes")


def test_auto_is_the_rule() -> None:
    assert operator_set(OperatorsConfig(), "cpu") is BY_RULE or operator_set(OperatorsConfig(), "cpu") == OperatorSet()


@pytest.mark.usefixtures("_vendor")
def test_variants_are_those_of_the_chip() -> None:
    assert list(variants("attention")) == ["blocks", "flash", "kernel", "tiles"]
    assert list(variants("attention", "cuda")) == ["flash", "kernel"]
    assert list(variants("gate", "cpu")) == ["eager", "float8_like", "generated", "wide"]
    assert list(variants("gate", "npu")) == ["eager", "float8_like", "generated", "narrow"]
    assert variants("norm", "npu")["eager"].value != "pulsar:norm"  # a name of this package
    assert load_variant("gate", "narrow", "npu")(1, 2) == ("narrow", None)


def test_what_this_package_has_is_found_without_searching_others(monkeypatch: pytest.MonkeyPatch) -> None:
    """To search them takes as long as much of a small run's start."""
    monkeypatch.setattr(registry, "entry_points", lambda **_: pytest.fail("searched"))
    OperatorsConfig("eager", "eager", "eager", "blocks", "eager").validate("cpu", "float32")
    assert load_variant("attention", "blocks", "cpu") is attention_blocks


@pytest.mark.usefixtures("_vendor")
def test_the_default_takes_the_place_of_a_variant_that_does_not_take_the_arguments() -> None:
    gate = operator_set(OperatorsConfig(gate="wide"), "cpu").gate
    narrow, exact = torch.ones(3), torch.ones(3, dtype=torch.float64)
    assert gate(narrow, narrow) == ("wide", None)
    given, factor = gate(narrow, exact)
    assert torch.equal(given, silu_gate(narrow, exact)[0])
    assert factor is exact


@pytest.mark.usefixtures("_vendor")
def test_products_in_float8_for_the_head_too_are_refused() -> None:
    with pytest.raises(RecipeError, match=r"operators.linear=float8_everywhere multiplies the head .* give Products a property"):
        operator_set(OperatorsConfig(linear="float8_everywhere"), "cpu")


@pytest.mark.usefixtures("_vendor")
def test_only_linear_layers_are_in_float8_by_their_name() -> None:
    OperatorsConfig(gate="float8_like").validate("cpu", "bfloat16")
    assert "float8_like" in measurable("gate", "cpu")
    assert "float8_everywhere" not in measurable("linear", "cpu")


def test_a_mask_or_a_gpu_is_the_kernels() -> None:
    query = torch.randn(1, 2, 5, 4, generator=torch.Generator().manual_seed(0))
    assert attention_blocks.takes(query, query, query, None, 3)
    assert not attention_blocks.takes(query, query, query, mask=torch.zeros(1, 1, 5, 5))
    assert not attention_blocks.takes(query.to("meta"), query, query)  # as on a GPU: it is no CPU's
    mask = torch.full((5, 5), -torch.inf).triu(1).view(1, 1, 5, 5)
    chosen = operator_set(OperatorsConfig(attention="blocks"), "cpu").attention
    assert torch.equal(chosen(query, query, query, mask=mask), attention_kernel(query, query, query, mask=mask))
    assert torch.equal(chosen(query, query, query), attention_blocks(query, query, query))


@pytest.mark.usefixtures("_vendor")
@pytest.mark.parametrize(
    ("config", "chip", "said"),
    [
        (
            OperatorsConfig(attention="block"),
            None,
            "operators.attention=block is unknown; give one of auto, blocks, flash, kernel, tiles",
        ),
        (OperatorsConfig(norm=""), "cpu", "operators.norm= is unknown; give one of auto, eager"),
        (
            OperatorsConfig(attention="blocks"),
            "cuda",
            "operators.attention=blocks is for cpu only, and the ranks compute on cuda; give one of auto, flash, kernel",
        ),
        (
            OperatorsConfig(gate="narrow"),
            "cpu",
            "is for npu only, and the ranks compute on cpu; give one of auto, eager, float8_like, generated, wide",
        ),
    ],
    ids=str,
)
def test_what_there_is_not_is_refused(config: OperatorsConfig, chip: str | None, said: str) -> None:
    with pytest.raises(RecipeError) as error:
        config.validate(chip, "float32")
    assert said in str(error.value)


@pytest.mark.usefixtures("_vendor")
def test_what_is_known_for_some_chip_is_not_refused_before_the_chip_is_known() -> None:
    OperatorsConfig(attention="blocks", gate="narrow").validate(None, "float32")


@pytest.mark.usefixtures("_vendor")
def test_a_package_that_cannot_be_imported_is_said() -> None:
    with pytest.raises(RecipeError, match=r"operators.attention=flash is registered as pulsar:missing, .* or give operators.att"):
        operator_set(OperatorsConfig(attention="flash"), "cpu")

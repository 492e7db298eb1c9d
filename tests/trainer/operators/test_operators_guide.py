"""The variant of docs/guides/operators.md is registered, passes the conformance suite, and trains."""

import re
import sys
import tomllib
from pathlib import Path

import pytest
import torch

from bagualu.trainer.operators.operator_set import OperatorSet, variant_of
from bagualu.trainer.operators.registry import DEFAULT_VARIANTS, GROUP, variants
from tests.harness import run
from tests.parity import assert_same, small_recipe, train
from tests.trainer.operators.conformance import check

GUIDE = (Path(__file__).parents[3] / "docs/guides/operators.md").read_text(encoding="utf-8")


def block(language: str) -> str:
    (found,) = re.findall(rf"```{language}\n(.*?)```", GUIDE, re.DOTALL)
    return found


def install(folder: Path) -> None:
    """Installs the package of the guide in `folder`, with the files that pip would write."""
    about = folder / "pulsar-1.0.dist-info"
    about.mkdir()
    (folder / "pulsar.py").write_text(block("python"))
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: pulsar\nVersion: 1.0\n")
    entries = tomllib.loads(block("toml"))["project"]["entry-points"]
    lines = [line for group, named in entries.items() for line in (f"[{group}]", *(f"{name} = {at}" for name, at in named.items()))]
    (about / "entry_points.txt").write_text("\n".join(lines))
    assert entries.keys() == {GROUP}


def test_the_variant_of_the_guide_conforms_and_trains(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install(tmp_path)
    monkeypatch.delitem(sys.modules, "pulsar", raising=False)
    monkeypatch.syspath_prepend(tmp_path)
    assert list(variants("attention", "cpu")) == ["blocks", "kernel", "products", "tiles"]
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        check("attention", variant_of("attention", "products", "cpu"), dtype, torch.device("cpu"))
    expected = run("simulated", 1, train, small_recipe(), 2)
    recipe = small_recipe(operators__attention="products", comm__backend="simulated", parallel__pipeline=2)
    assert_same(run("simulated", 2, train, recipe, 2), expected)


def test_the_guide_names_all_operators_and_their_variants() -> None:
    rows = dict(re.findall(r"^\| `(\w+)` \| ([^|]*) \|", GUIDE, re.MULTILINE))
    assert rows.keys() == DEFAULT_VARIANTS.keys() == vars(OperatorSet()).keys()
    for operator, row in rows.items():
        assert re.findall(r"`(\w+)`", row)[0] == DEFAULT_VARIANTS[operator]
        assert set(re.findall(r"`(\w+)`", row)) == set(variants(operator))

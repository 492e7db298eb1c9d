"""An export in the format of torch.distributed.checkpoint is loaded by torch itself, to the bit, and written a little at a time."""

import re
import weakref
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save
from transformers import AutoConfig, AutoModelForCausalLM

from bagualu.trainer.conversion import export_model as exporting
from bagualu.trainer.conversion.export_model import export_model
from bagualu.trainer.conversion.import_model import import_model
from bagualu.trainer.conversion.portions import portions
from tests.trainer.models.hugging_face.published import NAMES, publish


@pytest.fixture
def in_small_portions(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every tensor consists of several boxes, and the checkpoint of several files."""
    monkeypatch.setattr(exporting, "portions", partial(portions, most=100))
    monkeypatch.setattr(exporting, "SHARD_BYTES", 10_000)


@pytest.mark.usefixtures("in_small_portions")
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] * (index % 3 > 0)) for index, name in enumerate(NAMES)]
)
def test_torch_loads_the_state_of_a_model_of_transformers(name: str, tmp_path: Path) -> None:
    publish(name, tmp_path / "published", torch.bfloat16)
    brought = import_model(tmp_path / "published", tmp_path / "run")
    taken = export_model(tmp_path / "run", tmp_path / "exported", form="dcp")
    assert {**taken, "path": ""} == {**brought, "path": ""}
    assert len(list((tmp_path / "exported").glob("*.distcp"))) > 3
    expected = AutoModelForCausalLM.from_pretrained(tmp_path / "published", dtype=torch.bfloat16).state_dict()
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(tmp_path / "exported"), dtype=torch.bfloat16)
    state = model.state_dict()
    dcp.load(state, checkpoint_id=tmp_path / "exported")
    assert state.keys() == expected.keys()
    for key, tensor in expected.items():
        assert torch.equal(state[key], tensor), key
    dcp_to_torch_save(tmp_path / "exported", tmp_path / "saved.pt")
    saved = torch.load(tmp_path / "saved.pt", weights_only=True)
    assert saved.keys() == expected.keys()
    assert all(tensor.dtype == torch.bfloat16 and torch.equal(tensor, expected[key]) for key, tensor in saved.items())


def test_master_weights_are_exported_in_the_dtype_that_is_asked_for(tmp_path: Path) -> None:
    publish("qwen3_moe", tmp_path / "published")
    import_model(tmp_path / "published", tmp_path / "run")
    export_model(tmp_path / "run", tmp_path / "exported", "bfloat16", "dcp")
    for key, tensor in AutoModelForCausalLM.from_pretrained(tmp_path / "published").state_dict().items():
        state = {key: torch.zeros_like(tensor, dtype=torch.bfloat16)}
        dcp.load(state, checkpoint_id=tmp_path / "exported")
        assert torch.equal(state[key], tensor.bfloat16()), key


@pytest.mark.usefixtures("in_small_portions")
def test_no_more_than_two_boxes_are_in_memory_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    publish("mixtral", tmp_path / "published")
    import_model(tmp_path / "published", tmp_path / "run")
    yielded: list[weakref.ref[torch.Tensor]] = []

    def watched(*given: Any, values: Any = exporting._values) -> Iterator[Any]:
        for box, tensor in values(*given):
            yielded.append(weakref.ref(tensor))
            assert sum(reference() is not None for reference in yielded) <= 2
            yield box, tensor

    monkeypatch.setattr(exporting, "_values", watched)
    export_model(tmp_path / "run", tmp_path / "exported", form="dcp")
    assert len(yielded) > 100


def test_the_program_of_the_guide_loads_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    guide = (Path(__file__).parents[3] / "docs/guides/hugging_face.md").read_text(encoding="utf-8")
    (program,) = re.findall(r"```python\n(.*?)```", guide, re.DOTALL)
    publish("llama", tmp_path / "published", torch.bfloat16)
    import_model(tmp_path / "published", tmp_path / "run")
    export_model(tmp_path / "run", tmp_path / "llama-dcp", form="dcp")
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    exec(program, names)
    for key, tensor in AutoModelForCausalLM.from_pretrained(tmp_path / "published").state_dict().items():
        assert torch.equal(names["model"].state_dict()[key], tensor), key

"""The choice of operators is part of a run: recorded in its directory, kept when it goes on, and by whatever else computes with its
model."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from bagualu.comm.group import Communicator
from bagualu.comm.simulated import run
from bagualu.fault_tolerance.checkpoint.layout.directory import latest
from bagualu.fault_tolerance.checkpoint.reading.compare import differences
from bagualu.trainer.generation.find import compose_layout, find_model
from bagualu.trainer.generation.stages import load_stages
from bagualu.trainer.operators.attention import attention_blocks
from bagualu.trainer.operators.config import OperatorsConfig
from bagualu.trainer.operators.operator_set import operator_set
from bagualu.trainer.recipe.compose import save_recipe
from bagualu.trainer.recipe.config import Recipe
from bagualu.trainer.run import train
from tests.parity import small_recipe

STEPS = 4


def recipe_in(folder: Path, attention: str = "auto", **changes: object) -> Recipe:
    """In float32, so that the kernel is the usual variant of attention; with sequences long enough for other bits in blocks."""
    recipe = small_recipe(
        run__dir=str(folder), train__steps=STEPS, train__dtype="float32", train__validation_sequences=0, log__progress="off",
        data__sequence_length=80, data__global_batch=2, model__layers=2, comm__backend="simulated", optim__clip_norm=0.0,
        operators__attention=attention, **changes,
    )  # fmt: skip
    folder.mkdir(parents=True, exist_ok=True)
    save_recipe(recipe)
    return recipe


def trained(recipe: Recipe, stop_at: int | None = None, ranks: int = 1) -> dict[str, Any]:
    def whole(communicator: Communicator) -> dict[str, Any]:
        return train(recipe, communicator, lambda: communicator.monitor.step == stop_at)

    return run(ranks, whole)[0]


def resumed(recipe: Recipe) -> Recipe:
    return replace(recipe, checkpoint=replace(recipe.checkpoint, resume=True))


def recorded(folder: Path) -> dict[str, Any]:
    operators: dict[str, Any] = json.loads((folder / "operators.json").read_text())["operators"]
    return operators


def test_a_run_records_its_choice_and_keeps_it_bit_by_bit(tmp_path: Path) -> None:
    summary = trained(recipe_in(tmp_path / "whole", "blocks"))
    assert summary["operators"] == OperatorsConfig("eager", "eager", "eager", "blocks", "eager", "torch", "fused").as_dict()
    assert recorded(tmp_path / "whole")["attention"] == {"variant": "blocks", "why": "given", "seconds": {}}
    assert trained(recipe_in(tmp_path / "other"))["operators"]["attention"] == "kernel"
    assert trained(recipe_in(tmp_path / "stopped", "blocks"), stop_at=2)["ended"] == "stopped"
    assert trained(resumed(recipe_in(tmp_path / "stopped")))["operators"]["attention"] == "blocks"
    whole, other, stopped = (latest(tmp_path / name / "checkpoints") for name in ("whole", "other", "stopped"))
    assert whole
    assert other
    assert stopped
    assert not differences(whole, stopped)
    assert differences(whole, other)


def test_a_choice_on_other_ranks_is_kept_and_one_that_is_given_is_taken(tmp_path: Path, capsys: Any) -> None:
    folder = tmp_path / "run"
    trained(recipe_in(folder, "blocks"), stop_at=1)
    assert trained(resumed(recipe_in(folder)), stop_at=2, ranks=2)["operators"]["attention"] == "blocks"
    assert "operators" not in capsys.readouterr().err
    assert trained(resumed(recipe_in(folder, "kernel")))["operators"]["attention"] == "kernel"
    assert "operators.attention=kernel, as given; so far the run had blocks" in capsys.readouterr().err
    assert recorded(folder)["attention"]["variant"] == "kernel"


def test_a_change_of_chip_is_said_and_the_choice_is_kept(tmp_path: Path, capsys: Any) -> None:
    folder = tmp_path / "run"
    trained(recipe_in(folder, "blocks"), stop_at=1)
    record = json.loads((folder / "operators.json").read_text())
    (folder / "operators.json").write_text(json.dumps({**record, "chip": "an older chip"}))
    assert trained(resumed(recipe_in(folder)))["operators"]["attention"] == "blocks"
    assert "the run chose its operators on an older chip, is on" in capsys.readouterr().err
    assert json.loads((folder / "operators.json").read_text())["chip"] == "an older chip"


def test_a_start_that_is_refused_changes_no_record(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    trained(recipe_in(folder, "blocks"))
    assert trained(resumed(recipe_in(folder, "kernel")))["step"] == STEPS  # nothing is left to do
    assert recorded(folder)["attention"]["variant"] == "blocks"


def test_its_model_is_computed_as_in_the_run(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    trained(recipe_in(folder, "blocks"))
    recipe = recipe_in(folder)  # config.yaml says auto
    found = find_model(folder)

    def attention(words: list[str]) -> Any:
        layout = compose_layout("evaluate", found, words, str(tmp_path / "evaluate"), "")
        (model,) = run(1, lambda communicator: load_stages(layout, communicator, found.checkpoint).model)
        return model.layers["0"].attention.operators.attention

    assert recipe.operators.attention == "auto"
    assert attention([]) == operator_set(OperatorsConfig(attention="blocks"), "cpu").attention
    assert attention([]).variant is attention_blocks
    assert attention(["operators.attention=kernel"]) == operator_set(OperatorsConfig(attention="kernel"), "cpu").attention
    (folder / "operators.json").unlink()
    assert attention([]) == operator_set(OperatorsConfig(), "cpu").attention

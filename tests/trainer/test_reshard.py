"""A checkpoint of eight ranks read by one to six, over every axis: whole tensors and moments are the same, hash for hash."""

import hashlib
from pathlib import Path

import pytest

from bagualu.comm.errors import RecipeError
from bagualu.comm.group import Communicator
from bagualu.fault_tolerance.checkpoint.layout.directory import latest
from bagualu.trainer import assemble as assembling
from bagualu.trainer.assemble import assemble
from bagualu.trainer.data.corpus import prepare
from bagualu.trainer.recipe.config import Recipe
from bagualu.trainer.step import train_step
from tests.harness import run
from tests.parity import gather, pieces_of, small_recipe
from tests.trainer.states import load_state, save_state

STEPS = 2
DENSE = {"heads": 12, "kv_heads": 12, "hidden": 24, "ffn": 24, "vocab": 71, "layers": 6}
MIXTURE = {**DENSE, "moe__experts": 12, "moe__ffn": 12, "moe__every": 2, "moe__shared_experts": 1}
Layout = dict[str, object]
BEFORE: list[tuple[str, dict[str, object], Layout]] = [
    ("dense", DENSE, {"data": 2, "tensor": 2, "pipeline": 2, "balance": [2.5, 3.5]}),
    ("mixture", MIXTURE, {"data": 4, "expert": 4, "tensor": 2}),
]
AFTER: dict[str, list[Layout]] = {
    "dense": [{}, {"data": 2}, {"tensor": 3}, {"pipeline": 3, "balance": [1.5, 2, 2.5]}, {"data": 3, "zero": 0},
              {"data": 2, "pipeline": 2}, {"tensor": 4}, {"data": 2, "tensor": 3}, {"data": 3, "pipeline": 2},
              {"tensor": 2, "pipeline": 3}],
    "mixture": [{}, {"data": 2, "expert": 2}, {"data": 3, "expert": 3}, {"pipeline": 3}, {"data": 2, "expert": 2, "tensor": 2},
                {"data": 6, "expert": 3}, {"data": 2, "expert": 2, "pipeline": 3, "balance": [0.5, 3, 2.5]},
                {"tensor": 3, "data": 2}],
}  # fmt: skip


def recipe_for(folder: Path, model: dict[str, object], layout: Layout, micro_batch: int = 1, optimizer: str = "adamw") -> Recipe:
    return small_recipe(
        run__dir=str(folder),
        data__global_batch=24,
        train__micro_batch=micro_batch,
        optim__name=optimizer,
        **{f"model__{key}": value for key, value in model.items()},
        **{f"parallel__{key}": value for key, value in layout.items()},
    )


def hashes(pieces: list) -> dict[str, str]:  # type: ignore[type-arg]
    """Returns the hash of each whole tensor (weight or moment), put together from the pieces of all ranks."""
    return {name: hashlib.sha256(values.tobytes()).hexdigest() for name, values in gather(pieces).items()}


def train_and_save(communicator: Communicator, recipe: Recipe) -> list:  # type: ignore[type-arg]
    state = assemble(recipe, communicator, prepare(recipe.data, recipe.model.vocab))
    for step in range(STEPS):
        train_step(state, step)
    save_state(state, STEPS)
    return pieces_of(state)


def loaded(communicator: Communicator, recipe: Recipe) -> tuple[list, int]:  # type: ignore[type-arg]
    """The state as it was read, and the updates so far: the schedule goes on there."""
    state = assemble(recipe, communicator, prepare(recipe.data, recipe.model.vocab))
    path = latest(Path(recipe.run.dir) / "checkpoints")
    assert path is not None
    assert load_state(state, path) == STEPS
    return pieces_of(state), state.updates


@pytest.mark.parametrize(("name", "model", "before"), BEFORE, ids=[name for name, *_ in BEFORE])
def test_eight_ranks_are_read_by_one_to_six(tmp_path: Path, name: str, model: dict[str, object], before: Layout) -> None:
    recipe = recipe_for(tmp_path, model, before, micro_batch=6)
    assert recipe.world_size() == 8
    expected = hashes(run("simulated", 8, train_and_save, recipe))
    assert {key.split("/")[0] for key in expected} == {"weight", "exp_avg", "exp_avg_sq"}
    worlds = set()
    for layout in AFTER[name]:
        recipe = recipe_for(tmp_path, model, layout)
        worlds.add(recipe.world_size())
        ranks = run("simulated", recipe.world_size(), loaded, recipe)
        assert hashes([pieces for pieces, _ in ranks]) == expected, layout
        assert {updates for _, updates in ranks} == {STEPS}
    assert worlds >= {1, 2, 3, 4, 6}


def test_each_parameter_keeps_the_moments_of_its_optimizer(tmp_path: Path) -> None:
    expected = hashes(run("simulated", 8, train_and_save, recipe_for(tmp_path, MIXTURE, BEFORE[1][2], 6, "muon")))
    matrices = {name.partition("/")[2] for name in expected if name.startswith("momentum_buffer/")}
    others = {name.partition("/")[2] for name in expected if name.startswith("exp_avg/")}
    assert matrices | others == {name.partition("/")[2] for name in expected}
    assert {"layers.1.feed_forward.experts.up", "layers.1.feed_forward.router.weight"} <= matrices
    assert not matrices & others
    for layout in ({"tensor": 3, "data": 2}, {"data": 2, "expert": 2, "pipeline": 3}):
        recipe = recipe_for(tmp_path, MIXTURE, layout, optimizer="muon")
        assert hashes([pieces for pieces, _ in run("simulated", recipe.world_size(), loaded, recipe)]) == expected, layout


def test_the_same_over_processes(tmp_path: Path) -> None:
    _, model, before = BEFORE[1]
    expected = hashes(run("simulated", 8, train_and_save, recipe_for(tmp_path, model, before, micro_batch=6)))
    recipe = recipe_for(tmp_path, model, {"data": 3, "expert": 3})
    assert hashes([pieces for pieces, _ in run("gloo", 3, loaded, recipe)]) == expected


@pytest.mark.parametrize(
    ("layout", "message"),
    [
        ({"tensor": 5}, "not divisible by parallel.tensor=5"),
        ({"pipeline": 7}, "pipeline"),
        ({"data": 5}, "does not divide over 5 data ranks"),
        ({"data": 2, "expert": 5}, "parallel.expert=5"),
    ],
)
def test_a_layout_that_cannot_hold_it_is_refused_before_anything_is_allocated(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, layout: Layout, message: str
) -> None:
    def allocated(*_: object) -> None:
        raise AssertionError("the model was built")

    monkeypatch.setattr(assembling, "hold", allocated)
    recipe = recipe_for(tmp_path, MIXTURE, layout)
    with pytest.raises(RecipeError, match=message) as error:
        run("simulated", recipe.world_size(), loaded, recipe)
    assert "\n" not in str(error.value)

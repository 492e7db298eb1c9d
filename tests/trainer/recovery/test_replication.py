"""Runs that lose ranks and go on from their nodes' memory: bit for bit the run that lost nothing, with no checkpoint to read."""

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from bagualu.comm.errors import RecipeError
from bagualu.comm.group import Communicator
from bagualu.fault_tolerance.checkpoint.layout.directory import list_checkpoints
from bagualu.trainer import run as whole_run
from bagualu.trainer.recipe.config import Recipe
from tests.conftest import Undisturbed
from tests.harness import BACKENDS, ON_GPU, WorkerFailed, run
from tests.parity import small_recipe
from tests.standing import assert_stood, figures, train_noting_samples

STEPS = 6


def recipe_in(folder: Path, **changes: object) -> Recipe:
    """Two data ranks of two stages, on two nodes; a replica after every step, a checkpoint only at the end."""
    defaults: dict[str, object] = {
        "run__dir": str(folder / "run"), "train__steps": STEPS, "train__validation_sequences": 0, "log__progress": "off",
        "checkpoint__every": 0, "checkpoint__replica_every": 1, "parallel__data": 2, "parallel__pipeline": 2,
        "data__global_batch": 4, "model__layers": 2,
    }  # fmt: skip
    return small_recipe(**{**defaults, **changes})


@dataclass
class Killer:
    """Ends its rank when it comes to `point` of `step`, as far as its peers can tell by being killed."""

    step: int
    point: str

    def at(self, point: str, step: int) -> None:
        if (point, step) == (self.point, self.step):
            raise KeyboardInterrupt

    def waits(self, what: str | None) -> None:
        return None


def life(communicator: Communicator, recipe: Recipe, folder: Path, per_node: int, victim: int, step: int, point: str) -> Any:
    """A run; rank `victim` is killed in `step`."""
    if communicator.rank == victim:
        communicator.monitor.observers.append(Killer(step, point))
    scratch = folder / f"node-{communicator.rank // per_node}"
    scratch.mkdir(parents=True, exist_ok=True)
    return train_noting_samples(recipe, communicator, lambda: False, scratch)


def lose(backend: str, recipe: Recipe, folder: Path, victim: int, step: int, point: str) -> None:
    with pytest.raises((KeyboardInterrupt, WorkerFailed)):
        run(backend, 4, life, recipe, folder, 2, victim, step, point)


@pytest.fixture
def straight_on(tmp_path: Path, undisturbed: Undisturbed) -> Callable[[str], Path]:
    """The run that lost nothing, by backend: sums over four ranks have another order on each."""
    return lambda backend: undisturbed(recipe_in(tmp_path), backend)


@pytest.fixture
def straight(straight_on: Callable[[str], Path]) -> Path:
    return straight_on("simulated")


def assert_as_straight(recipe: Recipe, straight: Path, lost_at_most: int = 1, exact: bool = True) -> None:
    assert_stood(Path(recipe.run.dir), straight, lost_at_most, exact=exact)


def go_on(backend: str, recipe: Recipe, folder: Path, world: int = 4) -> None:
    """There is no checkpoint on storage that could be read."""
    assert list_checkpoints(Path(recipe.run.dir) / "checkpoints") == []
    recipe.checkpoint.resume = True
    summaries = run(backend, world, life, recipe, folder, 2, -1, 0, "")
    assert {summary["ended"] for summary in summaries} == {"done"}
    left = {path.name for node in folder.glob("node-*") for path in node.iterdir()}
    assert left <= {"begun"}  # of memory a run that ends leaves nothing; the mark goes with the launch's folder


@pytest.mark.parametrize("backend", [*BACKENDS, ON_GPU])
def test_a_lost_process(tmp_path: Path, straight_on: Callable[[str], Path], backend: str) -> None:
    recipe = recipe_in(tmp_path)
    lose(backend, recipe, tmp_path, 3, 4, "backward")
    assert len(figures(Path(recipe.run.dir))) == 3
    go_on(backend, recipe, tmp_path)
    assert_as_straight(recipe, straight_on(backend))


@pytest.mark.parametrize("backend", [*BACKENDS, ON_GPU])
def test_a_lost_node(tmp_path: Path, straight_on: Callable[[str], Path], backend: str) -> None:
    recipe = recipe_in(tmp_path)
    lose(backend, recipe, tmp_path, 2, 4, "optimizer")
    shutil.rmtree(tmp_path / "node-1")
    go_on(backend, recipe, tmp_path)
    assert_as_straight(recipe, straight_on(backend))


DEEPSPEED = {"parallel__engine": "deepspeed", "train__dtype": "float32"}
FSDP = {"parallel__engine": "fsdp", "parallel__bucket_bytes": Recipe().parallel.bucket_bytes}
ON_PROCESSES: list[dict[str, object]] = [
    {"parallel__zero": 3},
    FSDP,
    *({**DEEPSPEED, "parallel__zero": zero} for zero in (1, 2, 3)),
]


@pytest.mark.parametrize(
    ("backend", "engine"),
    [("simulated", {"parallel__zero": 3}), *(pytest.param("gloo", engine, marks=pytest.mark.slow) for engine in ON_PROCESSES)],
    ids=str,
)
def test_a_lost_node_with_every_engine(tmp_path: Path, undisturbed: Undisturbed, backend: str, engine: dict[str, object]) -> None:
    recipe = recipe_in(tmp_path, **engine, parallel__data=4, parallel__pipeline=1)
    lose(backend, recipe, tmp_path, 2, 4, "optimizer")
    shutil.rmtree(tmp_path / "node-1")
    go_on(backend, recipe, tmp_path)
    assert_as_straight(recipe, undisturbed(recipe_in(tmp_path, **engine, parallel__data=4, parallel__pipeline=1), backend))


@pytest.mark.parametrize("point", ["replicate", "mirror", "publish"])
@pytest.mark.parametrize("victim", [0, 3])
def test_lost_while_replicas_are_made(tmp_path: Path, straight: Path, point: str, victim: int) -> None:
    recipe = recipe_in(tmp_path)
    lose("simulated", recipe, tmp_path, victim, 4, point)
    go_on("simulated", recipe, tmp_path)
    assert_as_straight(recipe, straight)


@pytest.mark.parametrize("point", ["write", "commit"])
def test_lost_during_the_last_save(tmp_path: Path, straight: Path, point: str) -> None:
    """The last step is in memory, but a run is not done before it is on storage."""
    recipe = recipe_in(tmp_path)
    lose("simulated", recipe, tmp_path, 0, STEPS, point)
    go_on("simulated", recipe, tmp_path)
    assert_as_straight(recipe, straight)


def test_lost_while_going_on(tmp_path: Path, straight: Path) -> None:
    recipe = recipe_in(tmp_path)
    lose("simulated", recipe, tmp_path, 1, 4, "forward")
    shutil.rmtree(tmp_path / "node-0")
    recipe.checkpoint.resume = True
    lose("simulated", recipe, tmp_path, 2, 0, "fetch")
    lose("simulated", recipe, tmp_path, 2, 0, "load")
    lose("simulated", recipe, tmp_path, 1, 4, "forward")
    go_on("simulated", recipe, tmp_path)
    assert_as_straight(recipe, straight)


@pytest.mark.parametrize("layout", [{"data": 1, "pipeline": 2}, {"data": 2, "tensor": 2, "pipeline": 1}], ids=str)
def test_another_layout(tmp_path: Path, straight: Path, layout: dict[str, int]) -> None:
    recipe = recipe_in(tmp_path)
    lose("simulated", recipe, tmp_path, 3, 4, "backward")
    shutil.rmtree(tmp_path / "node-1")
    moved = recipe_in(tmp_path, **{f"parallel__{axis}": degree for axis, degree in layout.items()})
    go_on("simulated", moved, tmp_path, moved.world_size())
    assert_as_straight(moved, straight, exact=False)


def test_partners_lost_together_go_on_from_storage(tmp_path: Path, straight: Path) -> None:
    recipe = recipe_in(tmp_path, checkpoint__every=2)
    lose("simulated", recipe, tmp_path, 0, 6, "backward")
    for node in (0, 1):
        shutil.rmtree(tmp_path / f"node-{node}")
    recipe.checkpoint.resume = True
    summaries = run("simulated", 4, life, recipe, tmp_path, 2, -1, 0, "")
    assert {summary["ended"] for summary in summaries} == {"done"}
    assert_as_straight(recipe, straight, 2)


def test_a_newer_checkpoint_goes_before_an_older_replica(tmp_path: Path, straight: Path) -> None:
    recipe = recipe_in(tmp_path, checkpoint__replica_every=2, checkpoint__every=3)
    lose("simulated", recipe, tmp_path, 0, 4, "backward")
    recipe.checkpoint.resume = True
    lose("simulated", recipe, tmp_path, 0, 4, "forward")  # comes there at once
    assert [line["step"] for line in figures(Path(recipe.run.dir))] == [1, 2, 3]
    run("simulated", 4, life, recipe, tmp_path, 2, -1, 0, "")
    assert_as_straight(recipe, straight, 2)


def refused(communicator: Communicator, recipe: Recipe) -> str:
    with pytest.raises(RecipeError) as error:
        whole_run.train(recipe, communicator)
    return str(error.value)


def test_without_memory_that_outlives_a_worker_it_is_refused(tmp_path: Path) -> None:
    for text in run("simulated", 4, refused, recipe_in(tmp_path)):
        assert "start with `bagualu train`" in text
        assert "or give checkpoint.replica_every=0" in text

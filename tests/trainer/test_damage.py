"""Damaged checkpoints: every rank says the same, nothing has changed, and the run goes on from the one before."""

import json
import logging
import os
import shutil
import signal
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

from bagualu.comm.errors import RecipeError
from bagualu.comm.group import Communicator
from bagualu.fault_tolerance.checkpoint.layout.directory import latest, list_checkpoints
from bagualu.fault_tolerance.checkpoint.layout.format import CheckpointError
from bagualu.fault_tolerance.checkpoint.reading import load as load_module
from bagualu.fault_tolerance.checkpoint.reading.inspect import verify
from bagualu.fault_tolerance.checkpoint.saving.fence import EPOCH
from bagualu.fault_tolerance.checkpoint.saving.save import save
from bagualu.parallel.boxes import TensorPiece
from bagualu.trainer.assemble import TrainerState, assemble
from bagualu.trainer.data.corpus import prepare
from bagualu.trainer.process.failure import FinalError
from bagualu.trainer.recipe.config import Recipe
from bagualu.trainer.step import train_step
from tests.conftest import Undisturbed
from tests.harness import WorkerFailed, run
from tests.parity import small_recipe
from tests.standing import assert_stood, go_on
from tests.trainer.states import load_state, save_state
from tests.trainer.test_run import recipe_in, steps_saved, until

LAYOUT = {"parallel__data": 2, "parallel__pipeline": 2}
OLD, NEW = 2, 4


def fresh(communicator: Communicator, recipe: Recipe) -> TrainerState:
    return assemble(recipe, communicator, prepare(recipe.data, recipe.model.vocab))


def bits(parts: TrainerState) -> bytes:
    """All that the next step depends on, on this rank."""
    state = [p.detach().clone() for p in parts.engine.model.parameters()]
    state += [value for shard in parts.engine.optimizer.shards() for value in shard.values()]
    counters = repr((parts.updates, parts.scaler.scale, parts.scaler.good_steps)).encode()
    return b"".join(tensor.reshape(-1).view(torch.uint8).numpy().tobytes() for tensor in state) + counters


def train_and_save(communicator: Communicator, recipe: Recipe, steps: tuple[int, ...]) -> None:
    """Save after each of `steps`."""
    parts = fresh(communicator, recipe)
    for step in range(max(steps)):
        train_step(parts, step)
        if step + 1 in steps:
            save_state(parts, step + 1)


def flipped(file: Path, at: int) -> None:
    raw = bytearray(file.read_bytes())
    raw[at] ^= 1 << at % 8
    file.write_bytes(raw)


def exchanged(file: Path, other: Path) -> None:
    one, two = file.read_bytes(), other.read_bytes()
    file.write_bytes(two)
    other.write_bytes(one)


Damage = tuple[str, Callable[[], object]]


def truncations(path: Path) -> Iterator[Damage]:
    for file in sorted(path.iterdir()):
        size = file.stat().st_size
        for length in (0, 1, size // 2, size - 1):
            yield f"{file.name} cut to {length} of {size}", lambda file=file, length=length: os.truncate(file, length)


def flips(path: Path) -> Iterator[Damage]:
    """A byte of every region: length word, header and every tensor's first, middle and last of each shard; of the manifest the
    hash, every part of the first line, every tensor's table, and the end."""
    document = json.loads((path / "manifest.json").read_bytes())
    for number, (name, (size, header, _)) in enumerate(document["content"]["files"].items()):
        places = {0, 7, 8, header // 2, header - 1}
        for table in document["tables"]:
            starts = [at for at, file in zip(table["starts"], table["files"], strict=True) if file == number]
            places |= set(starts)
        edges = sorted(places | {size})
        places |= {(a + b) // 2 for a, b in pairwise(edges)} | {edge - 1 for edge in edges[1:]}
        for at in sorted(places):
            yield f"byte {at} of {name}", lambda name=name, at=at: flipped(path / name, at)
    raw = (path / "manifest.json").read_bytes()
    words = [b"hash", b"content", b"format", b"step", b"metadata", b"block_bytes", b"files", b"tensors", b"tables", b"]}"]
    words += [f'{{"tensor":"{name}"'.encode() for name in document["content"]["tensors"]]
    for word in words:
        for at in (raw.rindex(word), min(raw.rindex(word) + len(word) + 6, len(raw) - 1)):
            yield f"byte {at} of manifest.json", lambda at=at: flipped(path / "manifest.json", at)


def rearrangements(path: Path) -> Iterator[Damage]:
    """Files missing, under another name, swapped, doubled, and of another step."""
    files, other = sorted(path.iterdir()), path.with_name("step-00000002")
    shards = [file for file in files if file.suffix == ".safetensors"]
    for file in files:
        yield f"{file.name} deleted", file.unlink
        yield f"{file.name} renamed", lambda file=file: file.rename(path / f"{file.name}x")
        yield f"{file.name} of step 2", lambda file=file: shutil.copy(other / file.name, file)
    for one, two in pairwise(shards):
        yield f"{one.name} and {two.name} swapped", lambda one=one, two=two: exchanged(one, two)
        yield f"{one.name} twice", lambda one=one, two=two: shutil.copy(one, two)
    yield "all of step 2", lambda: [shutil.copy(file, path / file.name) for file in other.iterdir()]


KINDS = {"truncations": truncations, "flips": flips, "rearrangements": rearrangements}


def attempts(communicator: Communicator, recipe: Recipe, kind: str, every: int) -> list[tuple[str, str, bool]]:
    """Each damage in turn, put right after it: (what, the error on this rank, whether nothing has changed)."""
    parts, world = fresh(communicator, recipe), communicator.world
    before = bits(parts)
    path = latest(Path(recipe.run.dir) / "checkpoints")
    assert path is not None
    good = path.parent.with_name("good")
    if communicator.rank == 0:
        shutil.copytree(path, good)
    cases, seen = list(KINDS[kind](path))[::every], []
    world.barrier()
    for what, damage in cases:
        if communicator.rank == 0:
            damage()
        world.barrier()
        try:
            load_state(parts, path)
            said = "loaded"
        except CheckpointError as error:
            said = str(error)
        seen.append((what, said, bits(parts) == before))
        world.barrier()
        if communicator.rank == 0:
            for file in path.iterdir():
                if not (good / file.name).exists():
                    file.unlink()
            shutil.copytree(good, path, dirs_exist_ok=True)
        world.barrier()
    assert load_state(parts, path) == NEW
    assert bits(parts) != before
    return seen


@pytest.mark.parametrize(
    ("backend", "kind", "every", "least", "layout"),
    [("simulated", "truncations", 1, 20, LAYOUT), ("simulated", "flips", 1, 150, {"parallel__data": 2}),
     ("simulated", "rearrangements", 1, 20, LAYOUT),
     ("gloo", "truncations", 5, 4, LAYOUT), ("gloo", "flips", 25, 6, LAYOUT), ("gloo", "rearrangements", 5, 4, LAYOUT)],
    ids=["truncations", "flips", "rearrangements", "truncations-gloo", "flips-gloo", "rearrangements-gloo"],
)  # fmt: skip
def test_all_damage_is_found_by_all_ranks_before_anything_changes(
    tmp_path: Path, backend: str, kind: str, every: int, least: int, layout: dict[str, Any]
) -> None:
    layers = layout.get("parallel__pipeline", 1)
    recipe = small_recipe(run__dir=str(tmp_path), train__dtype="float32", model__layers=layers, **layout)
    run("simulated", recipe.world_size(), train_and_save, recipe, (OLD, NEW))
    ranks = run(backend, recipe.world_size(), attempts, recipe, kind, every)
    assert len(ranks[0]) >= least
    for cases in zip(*ranks, strict=True):
        what, said, unchanged = cases[0]
        assert len(set(cases)) == 1, f"ranks differ: {cases}"
        assert said != "loaded", what
        assert unchanged, what
        assert "\n" not in said
        assert "step-00000004" in said
        assert said.startswith("rank ")


def wrong_tensors(communicator: Communicator, recipe: Recipe, changes: list[tuple[str, Any]]) -> list[tuple[str, bool]]:
    """Load checkpoints whose tensors are those of the model but for one: (the error, whether nothing has changed)."""
    parts = fresh(communicator, recipe)
    root = Path(recipe.run.dir) / "checkpoints"
    seen = []
    for step, (_, change) in enumerate(changes):
        metadata = json.loads(json.dumps(document_of(root)["metadata"])) | {"step": step}
        pieces = [piece for found in parts.engine.pieces() for piece in change(found, communicator.rank)]
        path = save(root, step, pieces, metadata, communicator.world, 100)
        before = bits(parts)
        with pytest.raises(CheckpointError) as error:
            load_state(parts, path)
        seen.append((str(error.value), bits(parts) == before))
    return seen


def document_of(root: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((root / "step-00000099" / "manifest.json").read_bytes())["content"]
    return content


NORM = "weight/norm.weight"
Change = Callable[[TensorPiece, int], list[TensorPiece]]


def renamed(name: str) -> Change:
    return lambda p, rank: [TensorPiece(name, p.global_shape, p.offset, p.tensor)] if p.name == NORM else [p]


CHANGES: list[tuple[str, Change]] = [
    (f"tensor {NORM} is not in it", renamed("weight/other")),
    (f"tensor {NORM} is not in it", lambda p, rank: [] if p.name == NORM else [p]),
    ("tensor weight/extra is unknown to the model",
     lambda p, rank: [p, TensorPiece("weight/extra", p.global_shape, p.offset, p.tensor)] if p.name == NORM else [p]),
    (f"tensor {NORM} is (16,) torch.float32; the model has (16,) torch.float64",
     lambda p, rank: [TensorPiece(p.name, p.global_shape, p.offset, p.tensor.float())] if p.name == NORM else [p]),
    (f"tensor {NORM} is (2, 16) torch.float64; the model has (16,) torch.float64",
     lambda p, rank: [TensorPiece(p.name, (2, *p.global_shape), (row, *p.offset), p.tensor[None]) for row in (0, 1)]
     if p.name == NORM else [p]),
]  # fmt: skip


def test_a_wrong_key_dtype_shape_or_number_of_tensors_is_refused_by_name(tmp_path: Path) -> None:
    recipe = small_recipe(run__dir=str(tmp_path), **LAYOUT)
    run("simulated", 4, train_and_save, recipe, (1,))
    (tmp_path / "checkpoints" / "step-00000001").rename(tmp_path / "checkpoints" / "step-00000099")
    for rank in run("simulated", 4, wrong_tensors, recipe, CHANGES):
        for (expected, _), (said, unchanged) in zip(CHANGES, rank, strict=True):
            assert expected in said
            assert unchanged


METADATA = [
    (field, value) for field in ("step", "updates", "dtype", "identity", "scaler") for value in (None, -1, 1.5, "x", [], {})
]


def wrong_metadata(communicator: Communicator, recipe: Recipe) -> list[str]:
    parts = fresh(communicator, recipe)
    root = Path(recipe.run.dir) / "checkpoints"
    good = document_of(root)["metadata"]
    seen = []
    for step, (field, value) in enumerate(METADATA):
        path = save(root, step, parts.engine.pieces(), {**good, "step": step, field: value}, communicator.world, 100)
        before = bits(parts)
        with pytest.raises((CheckpointError, ValueError)) as error:
            load_state(parts, path)
        assert bits(parts) == before
        seen.append(str(error.value))
    return seen


def test_metadata_that_no_run_saves_is_refused(tmp_path: Path) -> None:
    recipe = small_recipe(run__dir=str(tmp_path))
    run("simulated", 1, train_and_save, recipe, (1,))
    (tmp_path / "checkpoints" / "step-00000001").rename(tmp_path / "checkpoints" / "step-00000099")
    for said in run("simulated", 1, wrong_metadata, recipe)[0]:
        assert "\n" not in said


# Falling back


def spoil(path: Path) -> None:
    """A byte in the middle of the last shard, which the last rank reads."""
    shard = sorted(path.glob("*.safetensors"))[-1]
    flipped(shard, shard.stat().st_size * 3 // 4)


def contents(folder: Path) -> dict[str, bytes]:
    """All that the run has written, but for who was there last."""
    files = [path for path in sorted(folder.rglob("*")) if path.is_file() and path.name != EPOCH]
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def test_the_run_goes_on_from_the_one_before_and_says_so_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, undisturbed: Undisturbed
) -> None:
    folder = tmp_path / "run"
    run("simulated", 4, until, recipe_in(folder, **LAYOUT), 0, NEW)
    spoil(folder / "checkpoints" / "step-00000004")
    damaged = contents(folder / "checkpoints" / "step-00000004")
    with caplog.at_level(logging.WARNING):
        summaries = run("simulated", 4, until, recipe_in(folder, checkpoint__resume=True, checkpoint__keep=9, **LAYOUT), -1, 0)
    assert_stood(folder, undisturbed(recipe_in(folder, **LAYOUT), "simulated"), 2)
    assert steps_saved(folder) == [2, 4, 6]  # step 4 is there again, whole
    assert all(verify(path) == [] for path in list_checkpoints(folder / "checkpoints"))
    (entry,) = summaries[0]["damaged"]
    assert all(summary["damaged"] == [entry] for summary in summaries)
    assert json.loads((folder / "summary.json").read_text())["damaged"] == [entry]
    assert (entry["checkpoint"], entry["used"]) == ("step-00000004", "step-00000002")
    assert contents(folder / "checkpoints" / entry["set_aside"]) == damaged
    said = [record.getMessage() for record in caplog.records if "cannot be used" in record.getMessage()]
    assert len(said) == 1
    for part in ("step-00000004", "rank ", "safetensors", "block at byte", "step-00000002"):
        assert part in said[0]
    assert sum(entry["set_aside"] in record.getMessage() for record in caplog.records) == 1


@pytest.mark.parametrize("world", [1, 2])
def test_with_several_damaged_the_newest_whole_one_is_taken(tmp_path: Path, undisturbed: Undisturbed, world: int) -> None:
    recipe = recipe_in(tmp_path, checkpoint__every=1, checkpoint__keep=9, parallel__data=world)
    run("simulated", world, until, recipe, 0, 4)
    for step in (2, 4):
        spoil(tmp_path / "checkpoints" / f"step-{step:08d}")
    (tmp_path / "checkpoints" / "step-00000003" / "manifest.json").write_bytes(b"{}")
    recipe.checkpoint.resume = True
    summary = run("simulated", world, until, recipe, -1, 0)[0]
    assert [entry["checkpoint"] for entry in summary["damaged"]] == ["step-00000004", "step-00000003", "step-00000002"]
    assert {entry["used"] for entry in summary["damaged"]} == {"step-00000001"}
    assert steps_saved(tmp_path) == [1, 2, 3, 4, 5, 6]
    assert_stood(tmp_path, undisturbed(recipe, "simulated"), 3)
    recipe.train.steps = 7
    assert run("simulated", world, until, recipe, -1, 0)[0]["damaged"] == []


def checkpoints_in(folder: Path) -> dict[str, bytes]:
    """What is in the run's checkpoints; beside them lies the number of the start, which every start raises."""
    return {name: raw for name, raw in contents(folder).items() if "step-" in name}


def test_with_none_whole_the_run_ends_naming_all_and_changes_nothing(tmp_path: Path) -> None:
    recipe = recipe_in(tmp_path, **LAYOUT)
    run("simulated", 4, until, recipe, 0, NEW)
    for path in list_checkpoints(tmp_path / "checkpoints"):
        spoil(path)
    before = checkpoints_in(tmp_path)
    recipe.checkpoint.resume = True
    with pytest.raises(FinalError, match=r"none of the 2 .* \(step-00000004: rank .*; step-00000002: rank .*\); restore") as error:
        run("simulated", 4, until, recipe, -1, 0)
    assert str(error.value).count(str(tmp_path)) == 1
    assert len(str(error.value).split("; ")) == 3  # one clause for each, and once what to do
    assert "\n" not in str(error.value)
    assert checkpoints_in(tmp_path) == before
    assert len(list_checkpoints(tmp_path / "checkpoints")) == 2


# Killed while loading


def killed_while_loading(communicator: Communicator, recipe: Recipe, rank: int, blocks: int) -> None:
    """This rank dies when it has read some blocks."""
    original, count = load_module.read_blocks, 0

    def read(*args: Any) -> None:
        nonlocal count
        count += 1
        if communicator.rank == rank and count > blocks:
            os.kill(os.getpid(), signal.SIGKILL)
        original(*args)

    load_module.read_blocks = read
    try:
        load_state(fresh(communicator, recipe), latest(Path(recipe.run.dir) / "checkpoints") or Path())
    finally:
        load_module.read_blocks = original


@pytest.mark.parametrize("after", [{}, {"parallel__data": 1, "parallel__tensor": 2}], ids=["same", "reshard"])
def test_killed_while_loading_the_checkpoint_is_as_it_was(
    tmp_path: Path, undisturbed: Undisturbed, after: dict[str, object]
) -> None:
    recipe = recipe_in(tmp_path, **LAYOUT)
    run("simulated", 4, until, recipe, 0, NEW)
    before = contents(tmp_path)
    other = recipe_in(tmp_path, checkpoint__resume=True, **{**LAYOUT, **after})
    with pytest.raises(WorkerFailed):
        run("gloo", 4, killed_while_loading, other, 1, 3)
    assert contents(tmp_path) == before
    run("simulated", 4, go_on, other)
    assert_stood(tmp_path, undisturbed(recipe, "simulated"), 0, exact=not after)


# Damaged data


def words(folder: Path, changed: str = "") -> Path:
    folder.mkdir(exist_ok=True)
    for number in range(8):
        text = "".join(f"{number}{word} lu gua ba\n" for word in range(200))
        (folder / f"{number}.txt").write_text(text + (changed if number == 3 else ""))
    return folder


def test_data_that_changed_under_a_run_is_refused_alike_by_every_number_of_ranks(tmp_path: Path, undisturbed: Undisturbed) -> None:
    text: dict[str, object] = {"data__source": str(words(tmp_path / "text")), "data__cache": str(tmp_path / "cache"),
                               "model__vocab": 300, "data__sequence_length": 16}  # fmt: skip
    run("simulated", 2, until, recipe_in(tmp_path / "run", **text), 0, 2)
    words(tmp_path / "text", "one more line\n")
    before = contents(tmp_path / "run" / "checkpoints")
    said = set()
    for world in (1, 2, 4):
        recipe = recipe_in(tmp_path / "run", checkpoint__resume=True, parallel__data=world, **text)
        with pytest.raises(RecipeError, match=r"was saved with data fingerprint=.* put the text of data\.source=") as error:
            run("simulated", world, until, recipe, -1, 0)
        said.add(str(error.value))
    assert len(said) == 1
    assert {name: raw for name, raw in contents(tmp_path / "run" / "checkpoints").items() if name in before} == before
    words(tmp_path / "text")
    recipe = recipe_in(tmp_path / "run", checkpoint__resume=True, **text)
    run("simulated", 2, until, recipe, -1, 0)
    assert_stood(tmp_path / "run", undisturbed(recipe, "simulated"), 0)


def test_a_row_that_is_no_text_is_refused_alike_by_every_number_of_ranks(tmp_path: Path) -> None:
    folder = words(tmp_path / "text")
    (folder / "5.txt").write_bytes((folder / "5.txt").read_bytes()[:100] + b"\xff\xfe")
    said = set()
    for world in (1, 2, 4):
        recipe = recipe_in(tmp_path / "run", data__source=str(folder), data__cache=str(tmp_path / "cache"), model__vocab=300,
                           parallel__data=world)  # fmt: skip
        with pytest.raises(RecipeError) as error:
            run("simulated", world, until, recipe, -1, 0)
        said.add(str(error.value))
    assert len(said) == 1
    assert "5.txt is not UTF-8 text (byte 100)" in said.pop()

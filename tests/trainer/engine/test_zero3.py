"""Native ZeRO-3: weights have memory while their module computes and while the module before it does, and at no other time."""

import gc
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch

from bagualu.comm.group import Communicator, Group
from bagualu.parallel.boxes import Box
from bagualu.trainer.assemble import TrainerState, assemble
from bagualu.trainer.data.corpus import prepare
from bagualu.trainer.engine.native import NativeEngine
from bagualu.trainer.evaluate import validate
from bagualu.trainer.models.decoder.initialise import seeded_values
from bagualu.trainer.recipe.config import Recipe
from bagualu.trainer.step import train_step
from tests.harness import BACKENDS, run
from tests.parity import gather, small_recipe, train

EMBEDDING, NORM, HEAD = 0, 5, 6
"""Numbers of the units of a model of four layers, which are units 1 to 4."""
VISITS = [EMBEDDING, 1, 2, 3, 4, NORM, HEAD, NORM, 4, 3, 2, 1]
"""In a micro-batch, forward and backward; embedding and head need no weights in the backward pass."""
Visit = tuple[int, list[int]]
"""A unit that begins to compute, and the units whose weights have memory then."""


def begin(communicator: Communicator, recipe: Recipe) -> TrainerState:
    return assemble(recipe, communicator, prepare(recipe.data, recipe.model.vocab))


def with_memory(state: TrainerState) -> list[int]:
    """The units whose weights have memory."""
    units = state.engine.model.units
    return [number for number, unit in enumerate(units) if all(p.untyped_storage().nbytes() for p in unit.parameters())]


def visits(communicator: Communicator, recipe: Recipe, steps: int) -> list[list[Visit]]:
    """Returns the visits of each step, and then those of a validation."""
    state = begin(communicator, recipe)
    assert isinstance(state.engine, NativeEngine)
    gatherer, log = state.engine.gatherer, list[Visit]()
    assert gatherer is not None
    acquire, numbers = gatherer.acquire, {id(unit): number for number, unit in enumerate(gatherer._order)}

    def watched(unit: object) -> None:
        acquire(unit)  # type: ignore[arg-type]
        log.append((numbers[id(unit)], with_memory(state)))

    gatherer.acquire = watched  # type: ignore[method-assign, assignment]
    found = []
    for step in range(steps):
        assert train_step(state, step).committed
        assert with_memory(state) == [], "after a step"
        found.append(log.copy())
        log.clear()
    assert validate(state) is not None
    assert with_memory(state) == [], "after a validation"
    return [*found, log]


def data_2(**changes: object) -> Recipe:
    return small_recipe(**{"parallel__data": 2, "parallel__zero": 3, "train__micro_batch": 4, **changes})


@pytest.mark.parametrize("backend", BACKENDS)
def test_only_the_unit_that_computes_and_the_next_one_have_memory(backend: str) -> None:
    for first, second, validation in run(backend, 2, visits, data_2(train__validation_sequences=8), 2):
        assert first == [(unit, [unit]) for unit in VISITS], "the order is not known yet"
        following = [*VISITS[1:], None]
        assert second == [(unit, sorted({unit, after} - {None})) for unit, after in zip(VISITS, following, strict=True)]  # type: ignore[type-var]
        forward = VISITS[: HEAD + 1]
        assert validation[:HEAD] == [(unit, [unit, unit + 1]) for unit in forward[:-1]]
        assert validation[HEAD] == (HEAD, [HEAD])


def test_recomputed_layers_are_gathered_no_more_often() -> None:
    for _, second, _ in run("simulated", 2, visits, data_2(train__recompute="full"), 2):
        again = [unit for unit, _ in second]
        assert [unit for index, unit in enumerate(again) if again[index - 1] != unit] == VISITS
        assert all(len(present) <= 2 for _, present in second)


class Counting:
    """A group that counts how often weights are gathered over it."""

    def __init__(self, group: Group) -> None:
        self.group, self.gathers = group, 0

    def __getattr__(self, name: str) -> Any:
        self.gathers += name == "all_gather"
        return getattr(self.group, name)


def gathers(communicator: Communicator, recipe: Recipe) -> tuple[list[tuple[int, int]], int]:
    """The units that begin to compute in the second step, each with its number of buckets, and how often one is gathered in it."""
    state = begin(communicator, recipe)
    assert isinstance(state.engine, NativeEngine)
    gatherer, log = state.engine.gatherer, list[tuple[int, int]]()
    assert gatherer is not None
    train_step(state, 0)
    acquire = gatherer.acquire
    for weights in gatherer._weights:
        group = Counting(weights.bucket.group)
        weights.bucket.group = group  # type: ignore[assignment]

    def watched(unit: Any) -> None:
        log.append((gatherer._order.index(unit), len(unit.weights)))
        acquire(unit)

    gatherer.acquire = watched  # type: ignore[method-assign]
    train_step(state, 1)
    return log, sum(weights.bucket.group.gathers for weights in gatherer._weights)  # type: ignore[attr-defined]


def test_weights_that_are_used_next_again_stay() -> None:
    """One layer on each pipeline rank: its backward pass of a micro-batch follows, or is followed by, a forward pass."""
    layout = {"parallel__pipeline": 2, "model__layers": 2, "train__micro_batch": 1, "parallel__bucket_bytes": 10**6}
    for units, count in run("simulated", 4, gathers, data_2(**layout)):
        assert count == sum(unit[1] for before, unit in pairwise([None, *units]) if unit != before)
        assert count < sum(buckets for _, buckets in units)


def kept(communicator: Communicator, recipe: Recipe) -> tuple[list[int], list[int]]:
    """The units that stay, seen in the backward pass of the first micro-batch, and those with memory after the step."""
    state = begin(communicator, recipe)
    during: list[list[int]] = []
    state.engine.reducer._reduce_part = watch(state, during, state.engine.reducer._reduce_part)  # type: ignore[attr-defined]
    train_step(state, 0)
    train_step(state, 1)
    return during[-1], with_memory(state)


def watch(state: TrainerState, log: list[list[int]], call: object) -> object:
    def watched(bucket: object) -> None:
        call(bucket)  # type: ignore[operator]
        log.append(with_memory(state))

    return watched


def test_weights_stay_for_the_whole_step_as_far_as_the_memory_cap_allows() -> None:
    caps = {"parallel__pipeline": 1, "parallel__memory_bytes": 10**9}
    for during, after in run("simulated", 2, kept, data_2(**caps)):
        assert (during, after) == (list(range(HEAD + 1)), [])
    for during, after in run("simulated", 2, kept, data_2()):
        assert during in ([], [1])
        assert after == []


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("model", [{}, {"model__moe__experts": 4, "model__moe__ffn": 24, "model__moe__bias_rate": 0.01}])
def test_every_dtype_trains_as_under_stage_2(dtype: str, model: dict[str, object]) -> None:
    """Bit for bit: the sums are the same, but for that of the norm, which is made by buckets."""
    three = data_2(train__dtype=dtype, train__micro_batch=2, optim__clip_norm=0.0, **model)
    two = replace(three, parallel=replace(three.parallel, zero=2))
    here, there = (run("simulated", 2, train, recipe, 3) for recipe in (three, two))
    assert here[0].losses == there[0].losses
    assert here[0].norms == pytest.approx(there[0].norms, rel=1e-6)
    ours, theirs = (gather([curve.pieces for curve in curves]) for curves in (here, there))
    assert all((ours[name] == values).all() for name, values in theirs.items())


def resident(communicator: Communicator, recipe: Recipe) -> tuple[int, int]:
    """Bytes of working weights that stay between steps, and bytes of the whole model's."""
    state = begin(communicator, recipe)
    train_step(state, 0)
    buckets = state.engine.buckets  # type: ignore[attr-defined]
    stays = sum(bucket.weights.untyped_storage().nbytes() + bucket.shard_weights.nbytes for bucket in buckets)
    return stays, sum(bucket.weights.nbytes for bucket in buckets)


def test_between_steps_a_rank_has_only_its_shard() -> None:
    for stays, whole in run("simulated", 4, resident, data_2(parallel__data=4, train__micro_batch=2)):
        assert stays == whole / 4


def parameters_alive() -> list[torch.nn.Parameter]:
    return [held for held in gc.get_objects() if isinstance(held, torch.nn.Parameter) and held.device.type == "cpu"]


def most_at_the_start(communicator: Communicator, recipe: Recipe) -> tuple[int, int]:
    """The most bytes of parameters alive when the first matrix of a layer is filled, and those of the whole model."""
    fill, most = seeded_values(recipe.model, recipe.run.seed), 0
    before = {id(held) for held in parameters_alive()}

    def watched(name: str, shape: tuple[int, ...], box: Box) -> torch.Tensor:
        nonlocal most
        if name.endswith("query.weight"):  # not for each tensor: this looks at all objects of the process
            parameters = [held for held in parameters_alive() if id(held) not in before]
            most = max(most, sum({p.untyped_storage().data_ptr(): p.untyped_storage().nbytes() for p in parameters}.values()))
        return fill(name, shape, box)

    engine = assemble(recipe, communicator, prepare(recipe.data, recipe.model.vocab), watched).engine
    return most, sum(parameter.nbytes for parameter in engine.model.parameters())


@pytest.mark.parametrize(
    "frozen",
    [pytest.param([], id="trained"), pytest.param([{"pattern": "layers.*", "frozen": True}], id="frozen", marks=pytest.mark.slow)],
)
def test_a_rank_never_holds_the_whole_model_not_even_at_the_start(frozen: list[dict[str, object]]) -> None:
    for most, whole in run("gloo", 2, most_at_the_start, data_2(model__layers=12, optim__groups=frozen)):
        assert 0 < most < whole / 6


def test_a_step_that_is_computed_again_begins_with_gathered_weights_freed() -> None:
    def again(communicator: Communicator, recipe: Recipe) -> list[float]:
        state = begin(communicator, recipe)
        losses = [train_step(state, 0).loss]
        state.engine.begin(1)
        unit = state.engine.gatherer._order[2]  # type: ignore[attr-defined]
        state.engine.gatherer.acquire(unit)  # type: ignore[attr-defined]  # an attempt that ends here
        return [*losses, train_step(state, 1).loss, len(with_memory(state))]

    (plain, *_), (interrupted, *_) = run("simulated", 2, train, data_2(), 2), run("simulated", 2, again, data_2())
    assert interrupted == [*plain.losses, 0]

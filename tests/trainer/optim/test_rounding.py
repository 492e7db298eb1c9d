"""Moments in bfloat16: rounded without bias, by bits that no layout and no restart changes."""

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from bagualu.comm.errors import RecipeError
from bagualu.comm.group import Communicator
from bagualu.trainer.assemble import assemble
from bagualu.trainer.data.corpus import prepare
from bagualu.trainer.optim import sharded
from bagualu.trainer.optim.rounding import element_numbers, noise, round_stochastically
from bagualu.trainer.recipe.config import Recipe
from bagualu.trainer.step import train_step
from tests.harness import run
from tests.parity import gather, pieces_of, small_recipe
from tests.trainer.states import load_state, save_state

HALF = {"train__dtype": "float32", "optim__moments_dtype": "bfloat16"}


def test_values_become_a_neighbour_and_on_average_themselves() -> None:
    values = torch.randn(500, generator=torch.Generator().manual_seed(0)) * torch.logspace(-30, 30, 500)
    count, total = 4000, torch.zeros(500, dtype=torch.float64)
    numbers, exact = torch.arange(500), values.double()
    for step in range(count):
        rounded = round_stochastically(values, noise(0, "t", numbers, step, len(numbers)) & 0xFFFF).double()
        assert ((rounded - exact).abs() < exact.abs() / 128).all(), "less than the distance of two neighbours"
        total += rounded
    error = (total / count - exact).abs() / (exact.abs() / 128)
    assert error.max() < 5 * 0.5 / count**0.5, "five deviations of a coin"


def test_what_bfloat16_holds_stays_and_what_is_not_finite_is_not() -> None:
    held = torch.tensor([0.0, 1.0, -2.5, 3.3895e38]).to(torch.bfloat16)
    bits = torch.full((4,), 0xFFFF, dtype=torch.int32)
    assert torch.equal(round_stochastically(held.float(), bits), held)
    odd = torch.tensor([float("inf"), float("-inf"), float("nan"), 3.4028e38])
    odd[2:3].view(torch.int32)[0] = 0x7FFFFFFF  # the NaN that GPUs make
    assert not round_stochastically(odd, bits).isfinite().any()


def test_the_bits_are_those_of_the_hash() -> None:
    """Written again, in unsigned numbers."""

    def mixed(number: int, step: int) -> int:
        digest = hashlib.blake2b(f"7/w/{step}".encode(), digest_size=8).digest()
        x = (number + int.from_bytes(digest[:4])) % 2**32
        x ^= (number >> 32) * int.from_bytes(digest[4:]) % 2**32
        for shift, multiplier in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
            x = (x ^ (x >> shift)) * multiplier % 2**32
        return x ^ (x >> 16)

    for numbers in ([0, 1, 2, 1000, 2**31 + 5], [7, 2**40, 2**40 + 1]):
        for step in (1, 2, 12345):
            found = noise(7, "w", torch.tensor(numbers), step, max(numbers) + 1)
            assert [bits % 2**32 for bits in found.tolist()] == [mixed(number, step) for number in numbers]


def test_the_bits_are_even_and_do_not_repeat() -> None:
    words = torch.stack([noise(0, name, torch.arange(2**14), step, 2**14) for name in ("a", "b") for step in (1, 2)])
    bits = torch.cat([words & 0xFFFF, (words >> 16) & 0xFFFF]).double()
    assert (bits.mean(1) / 65535 - 0.5).abs().max() < 0.01
    assert (torch.corrcoef(bits) - torch.eye(8)).abs().max() < 0.04
    assert all(word.unique().numel() == word.numel() for word in words)


def numbered(communicator: Communicator, recipe: Recipe) -> list[Any]:
    """The numbers that this rank gives its elements, as boxes."""
    state = assemble(recipe, communicator, prepare(recipe.data, recipe.model.vocab))
    optimizer = state.engine.optimizer
    for part, shard in zip(optimizer.parts, optimizer.shards(), strict=True):
        shard["weight"] = torch.zeros(shard["weight"].numel(), dtype=torch.float64)
        for entry, in_shard, in_parameter, numel in part.shard_entries():
            own = element_numbers(entry, in_parameter, in_parameter + numel, torch.device("cpu"))
            shard["weight"][in_shard : in_shard + numel] = own.double()
    pieces = [piece for piece in pieces_of(state) if piece[0].startswith("weight/")]
    state.engine.close()
    return pieces


MOE = {"model__moe__experts": 4, "model__moe__ffn": 8, "model__moe__every": 2, "model__vocab": 61}
LAYOUTS: list[dict[str, object]] = [
    {}, {"data": 2}, {"data": 3, "zero": 2}, {"tensor": 2}, {"data": 2, "tensor": 2, "expert": 2, "pipeline": 2},
    {"data": 4, "expert": 2, "tensor": 2, "zero": 3},
]  # fmt: skip
FSDP: dict[str, object] = {"engine": "fsdp", "bucket_bytes": Recipe().parallel.bucket_bytes}
ON_PROCESSES: list[dict[str, object]] = [
    {**FSDP, "data": 2, "tensor": 2},
    {**FSDP, "data": 4},  # two experts, whose columns are divided
    {"engine": "deepspeed", "data": 3, "zero": 1},
    {"engine": "deepspeed", "data": 2, "tensor": 2, "zero": 3},
]
MORE_ON_PROCESSES: list[dict[str, object]] = [
    {**FSDP, "data": 3},
    {**FSDP, "data": 4, "expert": 2},
    {**FSDP, "data": 4, "expert": 2, "shard": 2, "pipeline": 2},
    {"engine": "deepspeed", "data": 2, "expert": 2, "zero": 1, "pipeline": 2},
    {"engine": "deepspeed", "data": 4, "expert": 2, "zero": 2},
    {"engine": "deepspeed", "data": 3, "zero": 3},
]


def assert_numbered(layout: dict[str, object], backend: str, **changes: Any) -> None:
    parallel = {f"parallel__{key}": value for key, value in layout.items()}
    recipe = small_recipe(**{**MOE, **HALF, "data__global_batch": 12, **parallel, **changes})
    for name, numbers in gather(run(backend, recipe.world_size(), numbered, recipe)).items():
        assert np.array_equal(numbers.flatten(), np.arange(numbers.size)), name


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_every_element_has_its_number_in_the_whole_tensor(layout: dict[str, object]) -> None:
    assert_numbered(layout, "simulated")


@pytest.mark.parametrize(
    "layout", [*ON_PROCESSES, *(pytest.param(layout, marks=pytest.mark.slow) for layout in MORE_ON_PROCESSES)], ids=str
)
def test_every_element_has_its_number_with_every_engine(layout: dict[str, object]) -> None:
    experts = 2 if layout == ON_PROCESSES[1] else 4
    assert_numbered(layout, "gloo", model__moe__experts=experts, model__layers=2)


def trained(communicator: Communicator, recipe: Recipe) -> tuple[list[float], list[Any], set[torch.dtype]]:
    state = assemble(recipe, communicator, prepare(recipe.data, recipe.model.vocab))
    losses = [train_step(state, step).loss for step in range(recipe.train.steps)]
    dtypes = {
        tensor.dtype
        for shard in state.engine.optimizer.shards()
        for kind, tensor in shard.items()
        if kind not in ("weight", "step")
    }
    return losses, pieces_of(state), dtypes


@pytest.mark.parametrize("optim", ["adamw", "muon", *(pytest.param(one, marks=pytest.mark.slow) for one in ("lion", "sgd"))])
def test_it_trains_nearly_as_with_whole_moments(optim: str) -> None:
    changes: dict[str, Any] = {**MOE, "train__dtype": "float32", "train__steps": 20, "model__layers": 2, "optim__name": optim}
    ((whole, _, _),) = run("simulated", 1, trained, small_recipe(**changes))
    ((half, _, dtypes),) = run("simulated", 1, trained, small_recipe(**{**changes, **HALF}))
    assert dtypes == {torch.bfloat16}
    assert half != whole
    np.testing.assert_allclose(half, whole, rtol=2e-3)


def in_two(communicator: Communicator, recipe: Recipe) -> tuple[list[Any], list[Any]]:
    corpus = prepare(recipe.data, recipe.model.vocab)
    straight = assemble(recipe, communicator, corpus)
    for step in range(4):
        train_step(straight, step)
        if step == 1:
            save_state(straight, 2)
    other = assemble(recipe, communicator, corpus)
    load_state(other, Path(recipe.run.dir) / "checkpoints" / "step-00000002")
    for step in (2, 3):
        train_step(other, step)
    return pieces_of(straight), pieces_of(other)


@pytest.mark.parametrize("optim", ["adamw", "muon"])
def test_a_run_goes_on_to_the_bit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, optim: str) -> None:
    monkeypatch.setattr(sharded, "PIECE", 40)  # pieces that begin and end inside parameters
    recipe = small_recipe(**MOE, **HALF, run__dir=str(tmp_path), parallel__data=2, train__steps=4, optim__name=optim)
    for straight, other in run("simulated", 2, in_two, recipe):
        for (name, *_, one), (_, *_, two) in zip(straight, other, strict=True):
            assert one.tobytes() == two.tobytes(), name
    whole = small_recipe(**MOE, train__dtype="float32", run__dir=str(tmp_path), parallel__data=2, optim__name=optim)
    with pytest.raises(RecipeError, match=r"optim\.moments_dtype=bfloat16 but the recipe has float32; give optim\.moments_dtype=b"):
        run("simulated", 2, load_two, whole)


def load_two(communicator: Communicator, recipe: Recipe) -> None:
    state = assemble(recipe, communicator, prepare(recipe.data, recipe.model.vocab))
    load_state(state, Path(recipe.run.dir) / "checkpoints" / "step-00000002")


WRONG = [
    ({"optim__moments_dtype": "float16"}, "is unknown; give one of float32, bfloat16"),
    ({"optim__moments_dtype": "bfloat16"}, "does not go with train.dtype=float64; give optim.moments_dtype=float32"),
    ({**HALF, "optim__name": "sgd", "optim__momentum": 0.0}, "has no effect with optim.momentum=0"),
]


@pytest.mark.parametrize(("changes", "fix"), WRONG)
def test_wrong_input_is_one_line_with_the_fix(changes: dict[str, Any], fix: str) -> None:
    with pytest.raises(RecipeError) as refused:
        small_recipe(**changes).validate(1)
    assert fix in str(refused.value)

"""Muon on shards: its iteration, torch's own Muon, the balance of its work, and what holds copies."""

from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from bagualu.comm.group import Communicator
from bagualu.parallel import precision
from bagualu.parallel.data.shard import shard_pieces
from bagualu.trainer.assemble import assemble
from bagualu.trainer.data.corpus import prepare
from bagualu.trainer.models.decoder.shapes import parameter_shapes
from bagualu.trainer.optim.config import OptimConfig
from bagualu.trainer.optim.muon import cost, orthogonalise
from bagualu.trainer.recipe.config import Recipe
from bagualu.trainer.step import train_step
from tests.harness import run
from tests.parity import as_numpy, gather, pieces_of, small_recipe
from tests.trainer.optim.test_sharded import alone, newton_schulz, plain, trained_from

MOE = {"model__moe__experts": 4, "model__moe__ffn": 8, "model__moe__every": 2, "model__moe__shared_experts": 1}
MUON = {"optim__name": "muon"}


@pytest.mark.parametrize("shape", [(3, 6, 10), (2, 10, 6), (1, 5, 5), (2, 1, 7)], ids=str)
def test_it_is_the_plain_iteration_on_every_matrix(shape: tuple[int, ...]) -> None:
    matrices = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    for own, expected in zip(orthogonalise(matrices), map(newton_schulz, matrices), strict=True):
        torch.testing.assert_close(own, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("shape", [(6, 10), (10, 6), (7, 7)], ids=str)
def test_it_costs_what_the_balance_reckons_with(shape: tuple[int, int]) -> None:
    """A tall matrix costs no more than a wide one."""
    with FlopCounterMode(display=False) as counter:
        orthogonalise(torch.ones(3, *shape, dtype=torch.float64))
    assert counter.get_total_flops() == 2 * 5 * 3 * cost(*shape)
    assert cost(*shape) == cost(*shape[::-1])


def test_it_brings_singular_values_near_one_and_leaves_nothing_nothing() -> None:
    values = torch.linalg.svdvals(orthogonalise(torch.randn(2, 20, 50, dtype=torch.float64)))
    assert 0.6 < values.min() < values.max() < 1.3
    assert not orthogonalise(torch.zeros(1, 3, 4)).any()


def test_the_hidden_matrices_are_its_own() -> None:
    recipe = small_recipe(**MOE, **MUON)
    optimizers = {
        name: recipe.optim.treatment(name, len(shape)).optimizer for name, shape in parameter_shapes(recipe.model).items()
    }
    left = {name for name, optimizer in optimizers.items() if optimizer == "adamw"}
    assert left == {"embedding.weight", "head.weight"} | {name for name in optimizers if name.endswith("norm.weight")}
    assert {optimizers[f"layers.1.{name}"] for name in ("feed_forward.router.weight", "feed_forward.experts.down")} == {"muon"}


Pieces = list[tuple[str, tuple[int, ...], tuple[int, ...], np.ndarray]]


@dataclass(frozen=True)
class Step:
    """The state after an update, and the gradients from which it was made."""

    after: Pieces
    gradients: Pieces
    lr: float
    factor: float


def recorded(communicator: Communicator, recipe: Recipe, steps: int) -> tuple[Pieces, list[Step]]:
    state = assemble(recipe, communicator, prepare(recipe.data, recipe.model.vocab))
    before, gradients, rates, update = pieces_of(state), [], [], state.engine.step

    def step(lr: float, factor: float) -> None:
        owned = [part for part in state.engine.buckets if part.owned]
        pieces = [piece for part in owned for piece in shard_pieces("gradient", part, part.shard_gradients)]
        gradients.append([(piece.name, piece.global_shape, piece.offset, as_numpy(piece.tensor)) for piece in pieces])
        rates.append((lr, factor))
        update(lr, factor)

    state.engine.step = step  # type: ignore[method-assign]
    after = []
    for number in range(steps):
        assert train_step(state, number).committed
        after.append(pieces_of(state))
    return before, [Step(*both, *rate) for *both, rate in zip(after, gradients, rates, strict=True)]


def matrices_of(name: str, values: np.ndarray) -> dict[str, torch.Tensor]:
    return {f"{name}.{e}": torch.from_numpy(own) for e, own in enumerate(values)} if values.ndim == 3 else (
        {name: torch.from_numpy(values)})  # fmt: skip


CASES: list[tuple[str, str, dict[str, object]]] = [
    ("float32", "match_rms_adamw", {}),
    ("float32", "original", {"data": 2, "tensor": 2, "zero": 2}),
    ("float32", "match_rms_adamw", {"data": 4}),
    ("bfloat16", "match_rms_adamw", {"data": 2, "expert": 2, "pipeline": 2, "zero": 0}),
]


def accurate(matrix: torch.Tensor, *_: object) -> torch.Tensor:
    """Does what torch's muon does, which rounds all numbers to bfloat16, but rounds what it is given and the result alone."""
    return newton_schulz(matrix.bfloat16().double()).bfloat16()


@pytest.mark.parametrize("multiplies", [True, False], ids=["CPU multiplies bfloat16", "CPU widens bfloat16"])
@pytest.mark.parametrize(("dtype", "adjust_lr", "layout"), CASES, ids=str)
def test_an_update_of_a_float32_master_is_that_of_torchs_muon(
    dtype: str, adjust_lr: str, layout: dict[str, object], multiplies: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Given the same gradients; embedding, head and norms are compared in test_sharded.py. Where bfloat16 matrices are multiplied
    in float32, the iterations are more accurate than torch's, which are off by up to 3%."""
    monkeypatch.setattr(precision, "_CPU_MULTIPLIES", {torch.bfloat16: multiplies})
    if not multiplies:
        monkeypatch.setattr("torch.optim._muon._zeropower_via_newtonschulz", accurate)
    tolerance = 2e-2 if multiplies else 2e-3
    changes = {**MOE, **MUON, "model__layers": 2, "train__dtype": dtype, "optim__adjust_lr": adjust_lr}
    recipe = small_recipe(**changes, **{f"parallel__{key}": value for key, value in layout.items()})
    ranks, optim = run("simulated", recipe.world_size(), recorded, recipe, 3), recipe.optim
    weights, compared = gather([before for before, _ in ranks]), 0
    names = [
        name for name, shape in parameter_shapes(recipe.model).items() if optim.treatment(name, len(shape)).optimizer == "muon"
    ]
    mine = {key: own for name in names for key, own in matrices_of(name, weights[f"weight/{name}"]).items()}
    theirs = {key: own.clone().requires_grad_() for key, own in mine.items()}
    torchs = torch.optim.Muon(theirs.values(), weight_decay=optim.weight_decay, momentum=0.95, adjust_lr_fn=adjust_lr)
    for number in range(3):
        steps = [steps[number] for _, steps in ranks]
        gradients, after = gather([step.gradients for step in steps]), gather([step.after for step in steps])
        for name in names:
            for key, own in matrices_of(name, gradients[f"gradient/{name}"]).items():
                theirs[key].grad = own * steps[0].factor
        torchs.param_groups[0]["lr"] = steps[0].lr
        then = {key: own.detach().clone() for key, own in theirs.items()}
        torchs.step()
        new = {key: own for name in names for key, own in matrices_of(name, after[f"weight/{name}"]).items()}
        for key, own in new.items():
            expected, found = theirs[key].detach() - then[key], own - mine[key]
            assert (found - expected).norm() <= tolerance * expected.norm(), (key, number)
            compared += 1
        mine = new
    assert compared == 3 * (7 + 4 + 1 + 3 * 4 + 3)


def work(communicator: Communicator, recipe: Recipe) -> tuple[int, float]:
    """The number of matrices that this rank makes orthogonal, and what they cost it."""
    state = assemble(recipe, communicator, prepare(recipe.data, recipe.model.vocab))
    counts = state.engine.optimizer._matrices._counts
    return sum(counts.values()), sum(count * cost(*shape) for shape, count in counts.items())


DENSE: dict[str, Any] = {"layers": 12, "hidden": 48, "heads": 12, "kv_heads": 4, "ffn": 128}
"""bench_dense_124m, 1/16 as wide, with fewer heads of keys and values."""
MIXTURE: dict[str, Any] = {**DENSE, "layers": 4, "moe__experts": 16, "moe__ffn": 24, "moe__every": 2}


@pytest.mark.parametrize(
    ("model", "layout"),
    [
        (DENSE, {"data": 2}),
        (DENSE, {"data": 4}),
        (DENSE, {"data": 8}),
        (DENSE, {"data": 8, "zero": 0}),
        (DENSE, {"data": 4, "tensor": 2}),
        (MIXTURE, {"data": 4}),
        (MIXTURE, {"data": 8, "expert": 4}),
        (MIXTURE, {"data": 4, "expert": 2, "tensor": 2}),
    ],
    ids=lambda case: "mixture" if "moe__experts" in case else "dense" if "hidden" in case else str(case),
)
def test_ranks_have_about_equal_work(model: dict[str, Any], layout: dict[str, Any]) -> None:
    """With as many matrices in a bucket as at full width."""
    changes = {f"model__{key}": value for key, value in model.items()} | {f"parallel__{key}": size for key, size in layout.items()}
    recipe = small_recipe(**MUON, **changes, train__dtype="float32", parallel__bucket_bytes=25 * 2**20 // 16**2)
    counts, costs = zip(*run("simulated", recipe.world_size(), work, recipe), strict=True)
    assert max(costs) <= 1.15 * sum(costs) / len(costs)
    shapes = parameter_shapes(recipe.model).items()
    assert sum(counts) == sum(prod(shape[:-2]) for name, shape in shapes if "layers" in name and len(shape) > 1)


OWN = [
    {"pattern": "*.router.weight", "optimizer": "adamw", "lr": 3e-3},
    {"pattern": "embedding.weight", "optimizer": "muon", "weight_decay": 0.3},
    {"pattern": "*.attention.query.weight", "frozen": True},
    {"pattern": "layers.1.*", "lr": 2e-2},
]
SPREAD: list[dict[str, object]] = [
    {"data": 2, "tensor": 2, "zero": 0, "sequence": True},
    {"data": 4, "expert": 2, "zero": 3},
    {"pipeline": 2, "data": 2, "schedule": "zb_h1"},
    {"pipeline": 2, "tensor": 2, "data": 2, "expert": 2},
]


def test_groups_choose_what_it_updates_and_copies_stay_the_same_bits() -> None:
    """The guard compares them at every step: of ranks without ZeRO, of routers on tensor ranks, of a tied and padded embedding,
    here a matrix like any other, on both ends of a pipeline."""
    changes = {**MOE, **MUON, "optim__epsilon": 1e-5, "optim__groups": OWN, "model__vocab": 61, "model__tie_embeddings": True}
    losses, norms, state = plain(alone("float64", changes))
    for layout in SPREAD:
        recipe = alone(
            "float64", {**changes, "train__micro_batch": 1, **{f"parallel__{key}": size for key, size in layout.items()}}
        )
        recipe.validate(recipe.world_size())
        ranks = run("simulated", recipe.world_size(), trained_from, recipe)
        for own_losses, own_norms in (rank[2] for rank in ranks):
            np.testing.assert_allclose(own_losses, losses, rtol=1e-9)
            np.testing.assert_allclose(own_norms, norms, rtol=1e-9)
        found = gather([rank[1] for rank in ranks])
        assert found.keys() == state.keys()
        for name, expected in state.items():
            np.testing.assert_allclose(found[name], expected, rtol=1e-9, atol=1e-9 * np.abs(expected).max(), err_msg=name)


def test_momentum_is_kept_as_the_default_of_torch() -> None:
    assert OptimConfig(name="muon").momentum_kept == torch.optim.Muon([torch.zeros(1, 1)]).defaults["momentum"]
    assert OptimConfig(name="sgd").momentum_kept == 0.9

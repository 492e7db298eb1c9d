"""ShardedOptimizer over several steps against torch's own optimizers, clipping and plain autograd on the whole model."""

import functools
from dataclasses import replace
from fnmatch import fnmatch
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn.utils import clip_grad_norm_

from bagualu.comm.group import Communicator
from bagualu.parallel import precision
from bagualu.parallel.pipeline.layer_slice import LayerSlice
from bagualu.trainer.assemble import TrainerState, assemble
from bagualu.trainer.data.corpus import prepare
from bagualu.trainer.models.decoder.model import Decoder
from bagualu.trainer.optim.config import OptimConfig
from bagualu.trainer.optim.schedule import learning_rate
from bagualu.trainer.recipe.config import Recipe
from bagualu.trainer.step import local_micro_batches, train_step
from tests.covering import every_choice, in_turns
from tests.harness import run
from tests.parity import gather, pieces_of, small_recipe

STEPS = 4
MOE = {"model__moe__experts": 4, "model__moe__ffn": 8, "model__moe__every": 2, "model__moe__shared_experts": 1}
Weights = dict[str, torch.Tensor]


def trained(communicator: Communicator, recipe: Recipe) -> tuple[list[float], list[float], list[object], list[Weights]]:
    """Losses, norms, the state at the end, and the working weights after every step as far as the rank keeps them."""
    parts = assemble(recipe, communicator, prepare(recipe.data, recipe.model.vocab))
    results, weights = [], []
    for step in range(STEPS):
        results.append(train_step(parts, step))
        kept = [named for named in parts.engine.model.named_parameters() if named[1].untyped_storage().nbytes()]
        weights.append({name: parameter.detach().clone() for name, parameter in kept})
    return [r.loss for r in results], [r.grad_norm for r in results], pieces_of(parts), weights


def plain(recipe: Recipe, follow: list[Weights] | None = None) -> tuple[list[float], list[float], dict[str, np.ndarray]]:
    """The same in the way everybody writes it: one model, one batch, torch's optimizer.

    `follow`: working weights to go on from after every step. A master that lies between two 16-bit numbers is rounded one way or
    the other by its last digits, and all gradients after that depend on it.
    """
    parts: TrainerState = run("simulated", 1, lambda c: assemble(recipe, c, prepare(recipe.data, recipe.model.vocab)))[0]
    working = Decoder(recipe.model, [LayerSlice.of_layers(range(recipe.model.layers))]).to(getattr(torch, recipe.train.dtype))
    working.load_state_dict(parts.engine.model.state_dict())
    wide = torch.float64 if recipe.train.dtype == "float64" else torch.float32
    masters = {name: p.detach().to(wide).requires_grad_() for name, p in working.named_parameters()}
    for parameter in working.parameters():
        parameter.grad_dtype = wide  # no gradient is rounded on its way to the optimizer
    optim = recipe.optim
    groups, trained = [], {}
    for name, master in masters.items():
        chosen = next((group for group in optim.groups if fnmatch(name, group["pattern"])), {})
        if chosen.get("frozen"):
            working.get_parameter(name).requires_grad_(False)
            continue
        trained[name] = master
        decay = chosen.get("weight_decay", optim.weight_decay if master.dim() > 1 else 0.0)
        factor = chosen.get("lr", optim.lr) / optim.lr
        own = chosen.get("optimizer") or ("adamw" if master.dim() < 2 or name in ("embedding.weight", "head.weight") else "muon")
        groups.append({"params": [master], "weight_decay": decay, "factor": factor, "optimizer": own})
    torchs = oracle(optim, groups)
    losses, grad_norms = [], []
    for step in range(STEPS):
        batch = local_micro_batches(parts, step)
        for master in trained.values():
            master.grad = torch.zeros_like(master)
        total = 0.0
        for micro in batch:
            loss, balance = working(micro.inputs, micro.labels)
            share = loss / (len(batch) * micro.labels.numel())
            (share + recipe.model.moe.balance_loss * balance / recipe.data.global_batch).backward()
            for name, master in trained.items():
                parameter = working.get_parameter(name)
                master.grad += parameter.grad
                parameter.grad = None
            total += share.item()
        losses.append(total)
        grad_norms.append(clip_grad_norm_(trained.values(), optim.clip_norm or float("inf")).item())
        for group in torchs.param_groups:
            group["lr"] = group["factor"] * learning_rate(optim, step, recipe.train.steps)
        torchs.step()
        with torch.no_grad():
            for name, parameter in working.named_parameters():
                parameter.copy_(masters[name])
                if follow:
                    near = {"rtol": torch.finfo(parameter.dtype).eps, "atol": RELATIVE["bfloat16"] * parameter.abs().max().item()}
                    torch.testing.assert_close(parameter, follow[step][name], **near)
                    parameter.copy_(follow[step][name])
    state = {f"weight/{name}": master.detach().numpy() for name, master in masters.items()}
    for name, master in trained.items():
        moments = optim.moments(optim.treatment(name, master.ndim).optimizer)
        state |= {f"{moment}/{name}": torchs.state[master][moment].numpy() for moment in moments}
    return losses, grad_norms, state


def oracle(optim: OptimConfig, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
    """The same optimizer by somebody else; torch has no Lion, so that is written as its paper writes it."""
    first, second = optim.betas
    if optim.name == "sgd":
        return torch.optim.SGD(groups, momentum=optim.momentum_kept)
    if optim.name == "lion":
        return PaperLion(groups, first, second)
    if optim.name == "muon":
        return PlainMuon(optim, groups, betas=(first, second), eps=optim.epsilon)
    return torch.optim.AdamW(groups, betas=(first, second), eps=optim.epsilon)


class PlainMuon(torch.optim.AdamW):
    """torch's Muon in the dtype of the weights, on whole matrices, each expert's by itself; AdamW for the rest."""

    def __init__(self, optim: OptimConfig, groups: list[dict[str, Any]], **rest: Any) -> None:
        super().__init__(groups, **rest)
        self.momentum, self.original = 0.95 if optim.momentum is None else optim.momentum, optim.adjust_lr == "original"

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for weight in group["params"] if group["optimizer"] == "muon" else ():
                buffer = self.state[weight].setdefault("momentum_buffer", torch.zeros_like(weight))
                buffer.lerp_(weight.grad, 1 - self.momentum)
                update = weight.grad.lerp(buffer, self.momentum)
                weight *= 1 - group["lr"] * group["weight_decay"]
                for matrix, direction in zip(weight, update, strict=True) if weight.dim() == 3 else [(weight, update)]:
                    a, b = matrix.shape
                    ratio = max(1, a / b) ** 0.5 if self.original else 0.2 * max(a, b) ** 0.5
                    matrix -= group["lr"] * ratio * newton_schulz(direction)
                weight.grad = None  # nothing is left to AdamW
        super().step()


def newton_schulz(x: torch.Tensor) -> torch.Tensor:
    """Returns the result of five iterations, written as on https://kellerjordan.github.io/posts/muon/."""
    tall = x.shape[0] > x.shape[1]
    x = (x.T if tall else x) / x.norm().clamp(min=1e-7)
    for _ in range(5):
        gram = x @ x.T
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return x.T if tall else x


class PaperLion(torch.optim.Optimizer):
    """arXiv 2302.06675, algorithm 2, line by line."""

    def __init__(self, groups: list[dict[str, Any]], beta1: float, beta2: float) -> None:
        super().__init__(groups, {"lr": 0.0, "weight_decay": 0.0})
        self.beta1, self.beta2 = beta1, beta2

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        for group in self.param_groups:
            for theta in group["params"]:
                m = self.state[theta].setdefault("exp_avg", torch.zeros_like(theta))
                c = self.beta1 * m + (1 - self.beta1) * theta.grad
                theta -= group["lr"] * (torch.sign(c) + group["weight_decay"] * theta)
                m.copy_(self.beta2 * m + (1 - self.beta2) * theta.grad)


def alone(dtype: str, model: dict[str, object]) -> Recipe:
    defaults = {"train__dtype": dtype, "train__steps": 8, "train__micro_batch": 2, "model__layers": 2, "optim__epsilon": 1e-5}
    return small_recipe(**{**defaults, **model})


@functools.cache
def plain_model(dtype: str, model: tuple[tuple[str, object], ...]) -> tuple[list[float], list[float], dict[str, np.ndarray]]:
    return plain(alone(dtype, dict(model)))


RELATIVE = {"float64": 1e-10, "float32": 2e-4, "bfloat16": 2e-4}
MODELS: dict[str, dict[str, object]] = {"dense": {}, "tied": {"model__tie_embeddings": True}, "moe": MOE}
OVER_DATA: dict[str, dict[str, int]] = {
    "alone": {},
    "zero_1": {"data": 2},
    "zero_0": {"data": 2, "zero": 0},
    "zero_2": {"data": 2, "zero": 2},
}


@pytest.fixture
def _widened(monkeypatch: pytest.MonkeyPatch) -> None:
    """A chip that rounds every product to 16 bits leaves no bound that is worth something after four steps."""
    monkeypatch.setattr(precision, "_CPU_MULTIPLIES", {torch.bfloat16: False, torch.float16: False})


@pytest.mark.usefixtures("_widened")
@every_choice(name=list(MODELS), dtype=list(RELATIVE), layout=list(OVER_DATA))
def test_updates_are_those_of_torch(name: str, dtype: str, layout: str) -> None:
    model, relative = MODELS[name], RELATIVE[dtype]
    recipe = alone(dtype, {**model, **{f"parallel__{key}": value for key, value in OVER_DATA[layout].items()}})
    ranks = run("simulated", recipe.world_size(), trained, recipe)
    follow = ranks[0][3] if dtype == "bfloat16" else None
    losses, norms, state = plain(alone(dtype, model), follow) if follow else plain_model(dtype, tuple(model.items()))
    for own_losses, own_norms, *_ in ranks:
        np.testing.assert_allclose(own_losses, losses, rtol=relative)
        np.testing.assert_allclose(own_norms, norms, rtol=relative)
    found = gather([pieces for _, _, pieces, _ in ranks])
    assert found.keys() == state.keys()
    for name, expected in state.items():
        assert found[name].dtype == (np.float64 if dtype == "float64" else np.float32), name
        scale = np.abs(expected).max()
        np.testing.assert_allclose(found[name], expected, rtol=relative, atol=relative * scale, err_msg=name)


OPTIMIZERS: dict[str, dict[str, object]] = {
    "adamw": {"epsilon": 1e-5},
    "lion": {"name": "lion", "betas": [0.9, 0.99], "epsilon": 1e-8},
    "sgd": {"name": "sgd", "epsilon": 1e-8},
    "sgd without momentum": {"name": "sgd", "momentum": 0.0, "epsilon": 1e-8},
    "muon": {"name": "muon", "epsilon": 1e-5},
    "muon as the original": {"name": "muon", "epsilon": 1e-5, "adjust_lr": "original", "momentum": 0.5},
}
GROUPS = [
    {"pattern": "*attention*.weight", "lr": 3e-3, "weight_decay": 0.0},
    {"pattern": "*norm.weight", "weight_decay": 0.3},
    {"pattern": "layers.1.*", "lr": 2e-2},
]


FROZEN: dict[str, list[dict[str, object]]] = {
    "embedding": [{"pattern": "embedding.weight", "frozen": True}],
    "head and norms": [{"pattern": "head.weight", "frozen": True}, {"pattern": "*norm.weight", "frozen": True}],
    "first layer": [{"pattern": "embedding.weight", "frozen": True}, {"pattern": "layers.0.*", "frozen": True}],
    "first stage": [{"pattern": name, "frozen": True} for name in ("embedding.weight", "layers.0.*", "layers.1.*")],
    "all but experts": [{"pattern": "*.experts.*", "lr": 1e-2}, {"pattern": "*", "frozen": True}],
    "all but a norm": [{"pattern": "layers.0.attention_norm.weight", "lr": 1e-2}, {"pattern": "*", "frozen": True}],
}
EVERY_AXIS: list[dict[str, object]] = [
    {"data": 2, "expert": 2, "zero": 3}, {"tensor": 2, "pipeline": 2, "schedule": "interleaved_1f1b"},
]  # fmt: skip
ON_FEWER: list[dict[str, object]] = [
    {}, {"data": 2, "expert": 2}, {"data": 2, "zero": 0}, {"tensor": 2, "sequence": True}, {"pipeline": 2},
    {"pipeline": 2, "schedule": "zb_v"}, {"pipeline": 2, "data": 2, "schedule": "zb_h1", "zero": 3},
]  # fmt: skip
BY_HALVES: list[dict[str, object]] = [*ON_FEWER[-2:], EVERY_AXIS[-1]]


def called(value: str | dict[str, object]) -> str:
    return value if isinstance(value, str) else "-".join(f"{key}{degree}" for key, degree in value.items())


@in_turns(called, name=list(FROZEN), layout=EVERY_AXIS)
def test_frozen_parameters_stay_and_the_rest_trains_as_if_they_were_constants(name: str, layout: dict[str, object]) -> None:
    """Also on two layouts of fewer ranks; on all of those where slow tests run."""
    place = 2 * list(FROZEN).index(name)
    assert_frozen_are_constants(name, "float64", [layout, *(ON_FEWER[(place + more) % len(ON_FEWER)] for more in (0, 1))])


@pytest.mark.slow
@pytest.mark.parametrize("name", FROZEN)
def test_frozen_parameters_are_constants_on_every_layout(name: str) -> None:
    assert_frozen_are_constants(name, "float64", ON_FEWER)


@in_turns(called, name=list(FROZEN), layout=BY_HALVES)
def test_frozen_parameters_stay_with_masters_of_more_digits(name: str, layout: dict[str, object]) -> None:
    assert_frozen_are_constants(name, "bfloat16", [layout])


def assert_frozen_are_constants(name: str, dtype: str, layouts: list[dict[str, object]]) -> None:
    changes: dict[str, object] = {**MOE, "optim__groups": FROZEN[name], "model__layers": 4}
    losses, norms, state = plain(alone(dtype, changes)) if dtype == "float64" else ([], [], {})
    for layout in layouts:
        stages = {"train__micro_batch": 1} if "schedule" in layout else {}
        recipe = alone(dtype, {**changes, **{f"parallel__{key}": value for key, value in layout.items()}, **stages})
        recipe.validate(recipe.world_size())
        ranks = run("simulated", recipe.world_size(), trained_from, recipe)
        before, after = (gather([rank[which] for rank in ranks]) for which in (0, 1))
        for name, values in after.items():
            kind, _, parameter = name.partition("/")
            if recipe.optim.freezes(parameter):
                assert kind == "weight", "no optimizer state"
                assert np.array_equal(values, before[name]), name
        if dtype == "float64":
            for own_losses, own_norms in (rank[2] for rank in ranks):
                np.testing.assert_allclose(own_losses, losses, rtol=1e-9)
                np.testing.assert_allclose(own_norms, norms, rtol=1e-9)
            assert after.keys() == state.keys()
            for name, expected in state.items():
                np.testing.assert_allclose(after[name], expected, rtol=1e-9, atol=1e-9 * np.abs(expected).max(), err_msg=name)


def trained_from(communicator: Communicator, recipe: Recipe) -> tuple[Any, Any, tuple[list[float], list[float]]]:
    """The state before and after, and losses and norms. The guard looks at every step."""
    recipe = replace(recipe, guard=replace(recipe.guard, check_every=1))
    state = assemble(recipe, communicator, prepare(recipe.data, recipe.model.vocab))
    before = pieces_of(state)
    results = [train_step(state, step) for step in range(STEPS)]
    assert all(result.committed and result.verdict.attempts == 1 for result in results)
    after = pieces_of(state)
    state.engine.close()
    return before, after, ([r.loss for r in results], [r.grad_norm for r in results])


AXES: list[dict[str, object]] = [
    {}, {"data": 2, "expert": 2}, {"data": 2, "zero": 0}, {"tensor": 2, "pipeline": 2}, {"data": 2, "expert": 2, "zero": 2},
    {"data": 2, "tensor": 2, "zero": 3},
]  # fmt: skip


@pytest.mark.parametrize("optim", OPTIMIZERS)
def test_every_optimizer_is_its_oracle_on_every_axis(optim: str) -> None:
    """Every pair of an optimizer, a layout and whether parameters are in groups."""
    turn = list(OPTIMIZERS).index(optim) % 2
    assert_is_its_oracle(optim, [], AXES[turn::2])
    assert_is_its_oracle(optim, GROUPS, AXES[1 - turn :: 2])


@pytest.mark.slow
@pytest.mark.parametrize("optim", OPTIMIZERS)
def test_every_optimizer_is_its_oracle_on_every_axis_with_groups_and_without(optim: str) -> None:
    for groups in ([], GROUPS):
        assert_is_its_oracle(optim, groups, AXES)


def assert_is_its_oracle(optim: str, groups: list[dict[str, object]], layouts: list[dict[str, object]]) -> None:
    changes = {**MOE, **{f"optim__{key}": value for key, value in OPTIMIZERS[optim].items()}, "optim__groups": groups}
    losses, norms, state = plain(alone("float64", changes))
    for layout in layouts:
        recipe = alone("float64", {**changes, **{f"parallel__{key}": value for key, value in layout.items()}})
        recipe.validate(recipe.world_size())
        ranks = run("simulated", recipe.world_size(), trained, recipe)
        for own_losses, own_norms, *_ in ranks:
            np.testing.assert_allclose(own_losses, losses, rtol=1e-9)
            np.testing.assert_allclose(own_norms, norms, rtol=1e-9)
        found = gather([pieces for _, _, pieces, _ in ranks])
        assert found.keys() == state.keys()
        for name, expected in state.items():
            np.testing.assert_allclose(found[name], expected, rtol=1e-9, atol=1e-9 * np.abs(expected).max(), err_msg=name)


def test_the_bound_is_tight_enough_to_see_the_clip() -> None:
    """Clipping binds in these runs, and its factor is what is compared above."""
    recipe = small_recipe(train__steps=8, train__micro_batch=2, model__layers=2)
    _, norms, _ = plain(recipe)
    assert min(norms) > 2 * recipe.optim.clip_norm
    *_, clipped = plain(recipe)
    *_, free = plain(replace(recipe, optim=replace(recipe.optim, clip_norm=0.0)))
    assert np.abs(clipped["exp_avg/norm.weight"] - free["exp_avg/norm.weight"]).max() > 1e-4


def test_no_clipping_is_no_factor() -> None:
    recipe = small_recipe(train__steps=8, train__micro_batch=2, model__layers=2, optim__clip_norm=0.0)
    ((_, _, pieces, _),) = run("simulated", 1, trained, recipe)
    *_, state = plain(recipe)
    for name, values in gather([pieces]).items():
        np.testing.assert_allclose(values, state[name], rtol=1e-9, atol=1e-11, err_msg=name)


def working_weights(communicator: Communicator, recipe: Recipe) -> list[bool]:
    parts = assemble(recipe, communicator, prepare(recipe.data, recipe.model.vocab))
    for step in range(3):
        train_step(parts, step)
    masters = [shard["weight"] for shard in parts.engine.optimizer.shards()]
    pairs = zip(parts.engine.buckets, masters, strict=True)
    rounded = [torch.equal(bucket.shard_weights, master.to(torch.bfloat16)) for bucket, master in pairs]
    finer = any((m != m.to(torch.bfloat16).float()).any() for m in masters)
    return [*rounded, bool(finer), all(p.dtype == torch.bfloat16 for p in parts.engine.model.parameters())]


def test_bfloat16_weights_are_the_float32_masters_rounded() -> None:
    recipe = small_recipe(train__dtype="bfloat16", parallel__data=2)
    assert all(all(rank) for rank in run("simulated", 2, working_weights, recipe))

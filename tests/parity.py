"""Invariant 1 as a function: train a few steps on some layout and return what must not depend on the layout."""

from dataclasses import dataclass, replace

import numpy as np
import torch

from bagualu.comm.group import Communicator
from bagualu.trainer.assemble import TrainerState, assemble
from bagualu.trainer.data.corpus import prepare
from bagualu.trainer.recipe.config import Recipe
from bagualu.trainer.step import train_step


@dataclass(frozen=True)
class Curve:
    """Losses, gradient norms by step, and this rank's boxes of the weights and moments."""

    losses: list[float]
    balance_losses: list[float]
    norms: list[float]
    pieces: list[tuple[str, tuple[int, ...], tuple[int, ...], np.ndarray]]
    initial: list[tuple[str, tuple[int, ...], tuple[int, ...], np.ndarray]]


def pieces_of(state: TrainerState) -> list[tuple[str, tuple[int, ...], tuple[int, ...], np.ndarray]]:
    return [(p.name, p.global_shape, p.offset, as_numpy(p.tensor)) for p in state.engine.pieces()]


def local(tensor: torch.Tensor) -> torch.Tensor:
    """This rank's part of a tensor that FSDP2 divides; any other tensor itself."""
    with torch.no_grad():
        return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def working_tensors(state: TrainerState) -> list[tuple[str, torch.Tensor]]:
    """This rank's buffers and working weights; of weights that ranks divide, its part."""
    model, buckets = state.engine.model, getattr(state.engine, "buckets", [])
    kept = [(f"{index}/kept", bucket.kept) for index, bucket in enumerate(buckets) if bucket.kept is not None]
    parameters = [(name, local(parameter)) for name, parameter in model.named_parameters()]
    return [*model.named_buffers(), *kept, *(named for named in parameters if named[1].untyped_storage().nbytes())]


def as_numpy(tensor: torch.Tensor) -> np.ndarray:
    """A copy; numpy has no bfloat16, so that comes as its bits."""
    copy = tensor.detach().clone().cpu()
    return (copy.view(torch.int16) if copy.dtype == torch.bfloat16 else copy).numpy()


def train(communicator: Communicator, recipe: Recipe, steps: int) -> Curve:
    state = assemble(recipe, communicator, prepare(recipe.data, recipe.model.vocab))
    initial = pieces_of(state)
    results = [train_step(state, step) for step in range(steps)]
    assert all(result.committed for result in results)
    return Curve(
        [r.loss for r in results], [r.balance_loss for r in results], [r.grad_norm for r in results], pieces_of(state), initial
    )


def gather(all_pieces: list[list[tuple[str, tuple[int, ...], tuple[int, ...], np.ndarray]]]) -> dict[str, np.ndarray]:
    """Whole tensors from the ranks' boxes; every element must come from exactly one rank."""
    whole: dict[str, np.ndarray] = {}
    seen: dict[str, np.ndarray] = {}
    for pieces in all_pieces:
        for name, shape, offset, values in pieces:
            tensor = whole.setdefault(name, np.zeros(shape, values.dtype))
            times = seen.setdefault(name, np.zeros(shape, np.int64))
            where = tuple(slice(o, o + n) for o, n in zip(offset, values.shape, strict=True))
            tensor[where] = values
            times[where] += 1
    for name, times in seen.items():
        assert (times == 1).all(), f"{name}: some elements are held by {times.min()} to {times.max()} ranks"
    return whole


def small_recipe(**changes: object) -> Recipe:
    """A model small enough for many layouts, in float64; 3 kv groups and sizes that every degree up to 4 divides."""
    recipe = Recipe()
    recipe.model = replace(recipe.model, layers=4, hidden=16, heads=4, kv_heads=4, ffn=24, vocab=64, initial_std=0.1)
    recipe.model.moe = replace(recipe.model.moe)
    recipe.data = replace(recipe.data, source="random", sequence_length=8, global_batch=8)
    recipe.train = replace(recipe.train, steps=3, dtype="float64")
    recipe.optim = replace(recipe.optim, lr=1e-2, warmup_steps=1, clip_norm=0.05)
    recipe.parallel = replace(recipe.parallel, bucket_bytes=4096)
    recipe.checkpoint = replace(recipe.checkpoint, asynchronous=False)  # so that it is certain what is saved when
    for key, value in changes.items():
        *path, last = key.split("__")
        target: object = recipe
        for part in path:
            target = getattr(target, part)
        setattr(target, last, value)
    return recipe


def assert_same(actual: list[Curve], expected: list[Curve], relative: float = 1e-9, unfelt: str | None = None) -> None:
    """`unfelt`: how the names of parameters end that the loss does not depend on, so that their gradients are rounding errors."""
    for curve in actual:
        np.testing.assert_allclose(curve.losses, expected[0].losses, rtol=relative)
        np.testing.assert_allclose(curve.norms, expected[0].norms, rtol=relative)
        np.testing.assert_allclose(curve.balance_losses, expected[0].balance_losses, rtol=relative)
    before, reference_before = gather([c.initial for c in actual]), gather([c.initial for c in expected])
    after, reference_after = gather([c.pieces for c in actual]), gather([c.pieces for c in expected])
    assert after.keys() == reference_after.keys()
    for name, values in reference_after.items():
        if name.startswith("weight/"):
            assert np.array_equal(before[name], reference_before[name]), f"{name} does not begin the same"
        scale = np.abs(values).max()
        if unfelt is not None and name.endswith(unfelt):
            assert max(scale, np.abs(after[name]).max()) < relative, name
            continue
        np.testing.assert_allclose(after[name], values, rtol=relative, atol=relative * scale, err_msg=name)

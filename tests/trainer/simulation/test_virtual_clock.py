"""The virtual clock of ranks that train with real data, and the replay of their traces, give the same time."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TypeAlias

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from bagualu.comm import simulated
from bagualu.comm.cluster_file import load_cluster
from bagualu.comm.group import Communicator
from bagualu.comm.topology import Cluster
from bagualu.comm.virtual_clock import VirtualClock, clocked
from bagualu.parallel.simulation.events import Operator
from bagualu.parallel.simulation.replay import replay
from bagualu.trainer.assemble import assemble
from bagualu.trainer.data.corpus import prepare
from bagualu.trainer.models.decoder.moe import Router
from bagualu.trainer.recipe.compose import compose
from bagualu.trainer.recipe.config import Recipe
from bagualu.trainer.simulation.loads import divide, skewed
from bagualu.trainer.simulation.roles import trace_world
from bagualu.trainer.simulation.step_clock import StepClock
from bagualu.trainer.simulation.trace import Traced
from bagualu.trainer.step import train_step

Choose: TypeAlias = "Callable[[Tensor], tuple[Tensor, Tensor]]"
SMALL = ["data.source=random", "data.sequence_length=32", "train.micro_batch=1", "model.hidden=48", "model.ffn=96"]


def pairs() -> Cluster:
    """Nodes of two devices, whose links are so slow that communication takes as long as computation."""
    cluster = load_cluster("h100")
    inner, outer = cluster.parts[0].tiers
    tiers = replace(inner, devices=2, bytes_per_second=4e8), replace(outer, bytes_per_second=1e8)
    return replace(cluster, parts=(replace(cluster.parts[0], tiers=tiers),))


def seconds_of(operator: Operator) -> float:
    return 1e-6 + operator.flops / 1e11 + (operator.read_bytes + operator.written_bytes) / 1e10


def chosen_by_shares(choose: Choose, shares: Sequence[float]) -> Choose:
    """A router's choice that gives each expert its share of the rows, whatever the router says."""

    def chosen_in_turn(probabilities: Tensor) -> tuple[Tensor, Tensor]:
        weights, chosen = choose(probabilities)
        with _disable_current_modes():  # this is not part of the model
            rows = torch.tensor(divide(chosen.numel(), shares))
            chosen.data.copy_(torch.arange(len(shares)).repeat_interleave(rows).view_as(chosen))
        return weights, chosen

    return chosen_in_turn


def virtual(recipe: Recipe, world: int, shares: list[float] | None, steps: int = 2) -> list[float]:
    """The virtual times of the steps after the first, in which ZeRO-3 does not know the order of the weights yet."""

    def train(communicator: Communicator) -> list[float]:
        state = assemble(recipe, communicator, prepare(recipe.data, recipe.model.vocab))
        for module in state.engine.model.modules():
            if shares and isinstance(module, Router):
                module.choose = chosen_by_shares(module.choose, shares)  # type: ignore[method-assign]
        backend = clocked(communicator)
        assert backend is not None
        clock, times = StepClock(backend, seconds_of), []
        for step in range(steps):
            with clock.timing():
                train_step(state, step)
            times.append(clock.step_seconds)
        return times[1:]

    times: list[list[float]] = simulated.run(world, train, clock=VirtualClock(world, pairs()))
    assert all(ranks == times[0] for ranks in times)
    return times[0]


def recipe_of(name: str, *words: str) -> Recipe:
    return compose([f"recipe={name}", *SMALL, "model.layers=8", "data.global_batch=8", "comm.backend=simulated", *words])


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("tiny_dense", ["parallel.tensor=2", "parallel.data=2", "parallel.sequence=true"]),
        ("tiny_dense", ["parallel.pipeline=2", "parallel.schedule=zb_v", "parallel.tensor=2"]),
        ("tiny_dense", ["parallel.data=4", "parallel.zero=2"]),
        ("tiny_dense", ["parallel.data=4", "parallel.zero=3"]),
        ("moe_tiny", ["parallel.data=2", "parallel.expert=2", "parallel.pipeline=2", "parallel.zero=2"]),
        *(
            pytest.param(name, words, marks=pytest.mark.slow)
            for name, words in (
                ("tiny_dense", ["parallel.pipeline=4", "parallel.schedule=1f1b", "model.tie_embeddings=true"]),
                ("tiny_dense", ["parallel.data=4"]),
                ("tiny_dense", ["parallel.pipeline=2", "parallel.schedule=interleaved_1f1b", "parallel.data=2"]),
                ("tiny_dense", ["parallel.data=2", "parallel.shares=[5,3]"]),
                ("moe_tiny", ["parallel.data=4", "parallel.expert=2"]),
            )
        ),
    ],
)
def test_the_virtual_clock_agrees_with_the_replay(name: str, words: list[str]) -> None:
    recipe = recipe_of(name, *words)
    world, experts = recipe.world_size(), recipe.model.moe.experts
    rows = recipe.data.sequence_length * recipe.train.micro_batch * recipe.model.moe.top_k
    # Of whole rows, since a trace gives each rank the average of what the ranks send.
    shares = [count / rows for count in divide(rows, skewed(experts, 1.5))] if experts else None
    roles = trace_world(recipe, world, Traced("cpu", shares))
    replayed = replay(roles, recipe.validate(world), pairs().for_world(world), lambda rank, operator: seconds_of(operator))
    assert virtual(recipe, world, shares) == [pytest.approx(replayed.step_seconds, rel=1e-9)]


def test_the_virtual_clock_repeats_its_times_to_the_last_bit() -> None:
    recipe = recipe_of("tiny_dense", "parallel.data=2", "parallel.pipeline=2", "parallel.schedule=1f1b", "model.layers=2")
    first, second = (virtual(recipe, 4, None, steps=3) for _ in range(2))
    assert first == second
    assert first[0] == first[1]

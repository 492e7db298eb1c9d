"""The recipes of published models have the sizes that were published, and fit the devices for which they are."""

from math import prod

import pytest

from bagualu.comm.cluster_file import load_cluster
from bagualu.trainer.costs.fits import Device, check_memory
from bagualu.trainer.models.decoder.shapes import parameter_shapes
from bagualu.trainer.recipe.compose import compose
from bagualu.trainer.recipe.config import Recipe
from bagualu.trainer.simulation.setting import on_cluster

PUBLISHED = {
    "llama3_8b": (8.03e9, "h100", 512),
    "llama3_70b": (70.6e9, "h100", 64),
    "llama3_405b": (405.9e9, "h100", 16384),
    "gpt3_175b": (174.6e9, "a100", 384),
    "mixtral_8x7b": (46.7e9, "h100", 64),
    "qwen3_235b_a22b": (235.1e9, "h100", 256),
    "bagualu_14_5t": (14.5e12, "sw26010pro", 96000),
    "bagualu_174t": (174e12, "sw26010pro", 96000),
}
"""Parameters as published, and the cluster and number of devices of the layout."""


def recipe_of(name: str) -> Recipe:
    return on_cluster(compose([f"recipe={name}"]), load_cluster(PUBLISHED[name][1]))


@pytest.mark.parametrize("name", PUBLISHED)
def test_it_has_as_many_parameters_as_published(name: str) -> None:
    parameters = sum(map(prod, parameter_shapes(recipe_of(name).model).values()))
    assert parameters == pytest.approx(PUBLISHED[name][0], rel=5e-3)


def test_a_token_passes_as_many_parameters_of_qwen3_as_published() -> None:
    model = recipe_of("qwen3_235b_a22b").model
    shapes = parameter_shapes(model)
    experts = sum(prod(shape) for name, shape in shapes.items() if ".experts." in name)
    assert sum(map(prod, shapes.values())) - experts * (1 - model.moe.top_k / model.moe.experts) == pytest.approx(22.2e9, rel=5e-3)


@pytest.mark.parametrize("name", PUBLISHED)
def test_it_fits_the_devices_of_its_layout(name: str) -> None:
    _, cluster, world = PUBLISHED[name]
    chip = load_cluster(cluster).parts[0].chip
    check_memory(recipe_of(name), world, Device(chip.memory_bytes - chip.context_bytes, chip.name))

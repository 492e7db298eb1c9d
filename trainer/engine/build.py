"""Builds the engine that `parallel.engine` names."""

from importlib import import_module

from bagualu.parallel.balance.stages.forecast import Split
from bagualu.parallel.mesh import Mesh
from bagualu.parallel.parallelize import Fill
from bagualu.trainer.engine.protocol import Engine
from bagualu.trainer.recipe.config import Recipe

_MODULES = {"native": "native", "fsdp": "fsdp", "deepspeed": "deepspeed"}
"""The modules beside this one whose function `hold` builds an engine, by `parallel.engine`. Only the one that is asked for is
imported, so that the library behind an engine need not be installed for the others."""


def hold(recipe: Recipe, mesh: Mesh, split: Split, fill: Fill) -> Engine:
    """Builds an engine that holds this rank's stages of `split`, with weights and buffers from `fill`. Collective."""
    module = import_module(f"{__package__}.{_MODULES[recipe.parallel.engine]}")
    engine: Engine = module.hold(recipe, mesh, split, fill)
    return engine

"""How a recipe runs on the devices of a described cluster. Imports no torch, so that a wrong command is refused quickly."""

from dataclasses import replace

from bagualu.comm.errors import RecipeError
from bagualu.comm.topology import Cluster
from bagualu.trainer.recipe.config import Recipe


def on_cluster(recipe: Recipe, cluster: Cluster) -> Recipe:
    """Returns the recipe with the backend of the cluster's devices; the recipe's own is for the machine where it was written."""
    backend = "gloo" if chip_type(cluster) == "cpu" else "nccl"
    return replace(recipe, comm=replace(recipe.comm, backend=backend, device="cpu"))


def chip_type(cluster: Cluster) -> str:
    """Returns the type of device whose kernels a trace has (`Traced.chip`). Raises RecipeError if a mixed cluster has several."""
    types = {part.chip.type for part in cluster.parts}
    if len(types) > 1:
        raise RecipeError(f"cluster={cluster.name} has chips of types {' and '.join(sorted(types))}; give one with a single type")
    return types.pop()

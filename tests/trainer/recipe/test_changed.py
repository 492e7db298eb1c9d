"""Values of a recipe by their keys."""

from bagualu.trainer.recipe.changed import changed, value_of
from bagualu.trainer.recipe.config import Recipe


def test_values_are_changed_in_a_copy():
    recipe = Recipe()
    other = changed(recipe, {"parallel.tensor": 4, "model.moe.experts": 8, "faults": []})
    assert (value_of(other, "parallel.tensor"), value_of(other, "model.moe.experts")) == (4, 8)
    assert other.parallel.data == recipe.parallel.data
    assert recipe == Recipe()

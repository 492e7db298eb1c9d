"""Predictions are made without torch, so they repeat some numbers of modules that need torch."""

from typing import Any

import pytest

from bagualu.comm import gloo
from bagualu.parallel.data import bucket, reducer
from bagualu.trainer.costs import activations, buckets, prediction
from bagualu.trainer.models.decoder import config
from bagualu.trainer.operators import alibi, attention
from bagualu.trainer.optim import sharded

REPEATED: list[tuple[Any, str, Any, str]] = [
    (buckets, "_SHARD_MULTIPLE", bucket, "_SHARD_MULTIPLE"),
    (buckets, "_MOST_IN_FLIGHT", reducer, "_MOST_IN_FLIGHT"),
    (buckets, "_SENT_WHOLE", gloo, "_MANY"),
    (activations, "_BLOCK_ROWS", attention, "_BLOCK_ROWS"),
    (activations, "_BLOCK_ELEMENTS", attention, "_BLOCK_ELEMENTS"),
    (activations, "_ADDED_WIDTH", alibi, "ADDED_WIDTH"),
    (prediction, "_UPDATED_AT_ONCE", sharded, "PIECE"),
]


@pytest.mark.parametrize(("costs", "name", "module", "there"), REPEATED, ids=lambda case: case if isinstance(case, str) else "")
def test_a_repeated_number_is_that_of_the_module_that_it_is_about(costs: Any, name: str, module: Any, there: str) -> None:
    assert getattr(costs, name) == getattr(module, there)


def test_alibi_is_refused_for_positions_of_more_than_two_digits() -> None:
    assert config.LONGEST_ALIBI == alibi.BASE**2

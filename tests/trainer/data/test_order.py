"""What is computed ahead is the order that each position has by itself."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bagualu.trainer.data import order
from bagualu.trainer.data.order import Order, shuffle


@given(st.integers(1, 10_000), st.integers(0, 2**64 - 1), st.data())
def test_any_walk_over_an_epoch_reads_the_order_of_each_position(count: int, seed: int, data: st.DataObject) -> None:
    """Steps follow each other, go back after a fault, and begin anywhere after a resume."""
    orders = Order(count, seed)
    for _ in range(6):
        first, epoch = data.draw(st.integers(0, count - 1)), data.draw(st.integers(0, 1))
        positions = np.arange(first, min(count, first + data.draw(st.integers(1, 300))))
        assert np.array_equal(orders.at(epoch, positions), shuffle(positions, count, seed, epoch))
        assert np.array_equal(orders.at(epoch, positions[::-1]), shuffle(positions[::-1], count, seed, epoch))


def test_the_orders_of_many_steps_are_computed_together(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def counted(positions: np.ndarray, *others: int) -> np.ndarray:
        calls.append(len(positions))
        return shuffle(positions, *others)

    monkeypatch.setattr(order, "shuffle", counted)
    orders = Order(10_000, 1)
    found = [orders.at(0, np.arange(first, first + 10)) for first in range(0, 10_000, 10)]
    assert np.unique(np.concatenate(found)).tolist() == list(range(10_000))
    assert len(calls) <= 4

"""The layout to go on with on fewer ranks."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bagualu.parallel.layout import Layout
from bagualu.parallel.shrink_layout import largest_layout


def anything(layout):
    return True


DEGREE = st.integers(1, 4)


@given(data=DEGREE, tensor=DEGREE, pipeline=DEGREE, ranks=st.integers(1, 70))
def test_it_fits_grows_nothing_and_keeps_the_slices_while_a_whole_replica_is_left(data, tensor, pipeline, ranks):
    full = Layout(pipeline, data, 1, tensor)
    found = largest_layout(full, ranks, anything)
    assert found.world <= ranks
    assert found.data <= data
    assert found.tensor <= tensor
    assert found.pipeline <= pipeline
    if ranks >= full.world:
        assert found == full
    if ranks >= tensor * pipeline:
        assert (found.tensor, found.pipeline) == (tensor, pipeline)
        assert found.data == min(data, ranks // (tensor * pipeline))


@pytest.mark.parametrize(
    ("full", "ranks", "expected"),
    [
        (Layout(data=4), 3, Layout(data=2)),  # a batch of 8 does not divide over 3
        (Layout(data=4, expert=4), 3, Layout(data=2, expert=2)),
        (Layout(data=4, expert=2), 3, Layout(data=2, expert=2)),
        (Layout(data=2, tensor=2), 3, Layout(data=1, tensor=2)),
        (Layout(pipeline=2, tensor=4), 7, Layout(pipeline=1, tensor=4)),
        (Layout(pipeline=4, data=2), 3, Layout(pipeline=2, data=1)),
    ],
)
def test_what_does_not_divide_is_passed_over(full, ranks, expected):
    def divides(layout):
        return all(8 % degree == 0 for degree in (layout.data, layout.expert, layout.tensor, layout.pipeline))

    assert largest_layout(full, ranks, divides) == expected


def test_nothing_valid_is_said_so():
    assert largest_layout(Layout(data=4), 3, lambda layout: layout.data == 4) is None


def test_many_ranks_are_quick():
    full = Layout(pipeline=16, data=2048, tensor=8)
    assert largest_layout(full, full.world - 1, lambda layout: 2048 % layout.data == 0) == Layout(16, 1024, 1, 8)

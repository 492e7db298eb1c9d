"""Boxes against numpy, and against a search for the smallest number of them."""

from itertools import pairwise
from math import prod

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bagualu.parallel.boxes import Box, cover_problem, flat_range_to_boxes

shapes = st.lists(st.integers(1, 4), max_size=4).map(tuple)


@st.composite
def ranges(draw):
    shape = draw(shapes)
    start, stop = sorted(draw(st.tuples(*[st.integers(0, prod(shape))] * 2)))
    return shape, start, stop


@st.composite
def boxes_of(draw, shape):
    offset = tuple(draw(st.integers(0, n)) for n in shape)
    return Box(offset, tuple(draw(st.integers(0, n - o)) for n, o in zip(shape, offset, strict=True)))


def fewest(shape, start, stop):
    """Smallest number of contiguous boxes that make up [start, stop), by dynamic programming over where they end."""
    index = np.stack(np.unravel_index(np.arange(prod(shape)), shape), axis=1) if shape else np.zeros((1, 0), int)
    best = {start: 0}
    for end in range(start + 1, stop + 1):
        for begin in range(start, end):
            part = index[begin:end]
            if prod((part.max(0) - part.min(0) + 1).tolist()) == end - begin:
                best[end] = min(best.get(end, end), best[begin] + 1)
    return best[stop]


@given(ranges())
def test_boxes_hold_exactly_the_range_in_order_and_are_the_fewest(case):
    shape, start, stop = case
    numbers = np.arange(prod(shape)).reshape(shape)
    boxes = flat_range_to_boxes(shape, start, stop)
    parts = [numbers[box.slices((0,) * len(shape))].reshape(-1) for _, box in boxes]
    assert [int(part[0]) for part in parts] == [flat for flat, _ in boxes]
    assert [int(n) for part in parts for n in part] == list(range(start, stop))
    assert len(boxes) == fewest(shape, start, stop)


def test_the_two_dimensional_picture():
    boxes = flat_range_to_boxes((5, 4), 2, 17)
    assert boxes == [(2, Box((0, 2), (1, 2))), (4, Box((1, 0), (3, 4))), (16, Box((4, 0), (1, 1)))]
    assert flat_range_to_boxes((), 0, 1) == [(0, Box((), ()))]
    assert flat_range_to_boxes((7,), 2, 5) == [(2, Box((2,), (3,)))]
    assert flat_range_to_boxes((3, 0), 0, 0) == []


@pytest.mark.parametrize(("start", "stop"), [(-1, 2), (3, 2), (0, 13)])
def test_a_range_outside_the_tensor_is_refused(start, stop):
    with pytest.raises(ValueError, match="does not lie in the 12 elements"):
        flat_range_to_boxes((3, 4), start, stop)


@given(st.data(), shapes)
def test_intersection_is_that_of_numpy(data, shape):
    a, b = data.draw(boxes_of(shape)), data.draw(boxes_of(shape))
    origin = (0,) * len(shape)
    first, second = np.zeros(shape, bool), np.zeros(shape, bool)
    first[a.slices(origin)], second[b.slices(origin)] = True, True
    common, both = np.zeros(shape, bool), a.intersection(b)
    if both:
        common[both.slices(origin)] = True
    assert np.array_equal(common, first & second)


@given(st.data(), shapes)
def test_coverage_is_that_of_numpy(data, shape):
    cuts = sorted({0, prod(shape), *data.draw(st.lists(st.integers(0, prod(shape)), max_size=3))})
    boxes = [box for a, b in pairwise(cuts) for _, box in flat_range_to_boxes(shape, a, b)]
    boxes += data.draw(st.lists(boxes_of(shape), max_size=1))
    if data.draw(st.booleans()) and boxes:
        boxes.pop(data.draw(st.integers(0, len(boxes) - 1)))
    count = np.zeros(shape, int)
    for box in boxes:
        count[box.slices((0,) * len(shape))] += 1
    assert (cover_problem(shape, boxes) is None) == bool((count == 1).all())


def test_what_is_wrong_with_a_cover_is_said():
    assert "overlap" in (cover_problem((4,), [Box((0,), (3,)), Box((2,), (2,))]) or "")
    assert "only 3 of 4" in (cover_problem((4,), [Box((0,), (3,))]) or "")
    assert "does not lie in" in (cover_problem((4,), [Box((2,), (3,))]) or "")


def test_shift_turns_a_box_of_a_local_tensor_into_one_of_the_global():
    assert Box((1, 2), (3, 4)).shift((10, 20)) == Box((11, 22), (3, 4))

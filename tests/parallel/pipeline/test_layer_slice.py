"""What a slice holds of each layer, what several hold together, and how a person reads it."""

import pytest

from bagualu.parallel.pipeline.layer_slice import LayerPart, LayerSlice, cut_inside, parts_of

WHOLE, ATTENTION, FEED_FORWARD = LayerPart.WHOLE, LayerPart.ATTENTION, LayerPart.FEED_FORWARD


@pytest.mark.parametrize(
    ("one", "parts", "count", "text"),
    [
        (LayerSlice(0, 8), dict.fromkeys(range(4), WHOLE), 4, "0-3"),
        (LayerSlice(0, 9), {**dict.fromkeys(range(4), WHOLE), 4: ATTENTION}, 4.5, "0-3 and attention of 4"),
        (LayerSlice(9, 16), {4: FEED_FORWARD, **dict.fromkeys(range(5, 8), WHOLE)}, 3.5, "feed-forward of 4 and 5-7"),
        (LayerSlice(3, 5), {1: FEED_FORWARD, 2: ATTENTION}, 1, "feed-forward of 1 and attention of 2"),
        (LayerSlice(2, 3), {1: ATTENTION}, 0.5, "attention of 1"),
        (LayerSlice(3, 4), {1: FEED_FORWARD}, 0.5, "feed-forward of 1"),
    ],
)
def test_a_slice_holds_whole_layers_and_halves_at_its_ends(one: LayerSlice, parts: object, count: float, text: str) -> None:
    assert list(one.parts().items()) == list(parts.items())  # type: ignore[attr-defined]
    assert (one.count, type(one.count), str(one)) == (count, type(count), text)
    assert cut_inside([LayerSlice(0, 2), one]) == (one != LayerSlice(0, 8)) == (not one.whole)


def test_two_halves_are_a_whole_layer() -> None:
    assert parts_of([LayerSlice(0, 3), LayerSlice(3, 5)]) == {0: WHOLE, 1: WHOLE, 2: ATTENTION}
    assert parts_of([LayerSlice(1, 2), LayerSlice(6, 7)]) == {0: FEED_FORWARD, 3: ATTENTION}


def test_halves_have_the_names_of_their_modules_and_compute_only_themselves_again() -> None:
    names = ["attention_norm.weight", "attention.query.weight", "feed_forward_norm.weight", "feed_forward.router.bias"]
    assert [part.holds(name) for name in names for part in LayerPart] == [True, True, False] * 2 + [True, False, True] * 2
    assert [WHOLE.again(part) for part in ("none", "attention", "experts", "full")] == ["none", "attention", "experts", "full"]
    assert [ATTENTION.again(part) for part in ("none", "attention", "experts", "full")] == ["none", "full", "none", "full"]
    assert [FEED_FORWARD.again(part) for part in ("none", "attention", "experts", "full")] == ["none", "none", "full", "full"]

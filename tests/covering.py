"""Few of many cases that still hold every pair of choices: most defects need one choice, or two of them together, to show."""

from collections.abc import Callable, Hashable, Mapping, Sequence
from itertools import combinations, product
from typing import Any

import pytest


def covering(cases: Sequence[Mapping[str, Hashable]]) -> list[int]:
    """Returns the indices, in ascending order, of some of `cases`: each pair of choices that is in any of them is in one of these.

    A case maps the names of its choices to what is chosen. Taken greedily: next is always the first case of those with the most
    pairs that are missing.
    """
    pairs = [{frozenset(pair) for pair in combinations(case.items(), 2)} or {frozenset(case.items())} for case in cases]
    missing = set().union(*pairs)
    chosen: list[int] = []
    while missing:
        chosen.append(max(range(len(cases)), key=lambda index: len(pairs[index] & missing)))
        missing -= pairs[chosen[-1]]
    return sorted(chosen)


def every_choice(**axes: Sequence[Any]) -> Any:
    """Marks a test with the product of `axes`, by the names of its arguments. What a covering set leaves out is slow."""
    cases = list(product(*axes.values()))
    quick = set(covering([dict(zip(axes, map(str, case), strict=True)) for case in cases]))
    return pytest.mark.parametrize(
        tuple(axes),
        [
            pytest.param(*case, id="-".join(map(str, case)), marks=[pytest.mark.slow] * (index not in quick))
            for index, case in enumerate(cases)
        ],
    )


def in_turns(called: Callable[[Any], str] = str, /, **axes: Sequence[Any]) -> Any:
    """Marks a test with all pairs of two axes, by the names of its arguments. Each value of the first takes its turn with one of
    the second; its other pairs are slow. `called` gives the name of a value in the test's id."""
    first, second = axes.values()
    return pytest.mark.parametrize(
        tuple(axes),
        [
            pytest.param(one, other, id=f"{called(one)}-{called(other)}", marks=[pytest.mark.slow] * (place % len(second) != turn))
            for turn, other in enumerate(second)
            for place, one in enumerate(first)
        ],
    )

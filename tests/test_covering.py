"""Every pair of choices stays; as few cases as a greedy search finds."""

from itertools import combinations, product

from tests.covering import covering, every_choice, in_turns


def pairs_of(cases):
    return {pair for case in cases for pair in combinations(sorted(case.items()), 2)}


def test_every_pair_of_choices_is_in_a_case_that_is_chosen():
    cases = [dict(zip("abcd", values, strict=True)) for values in product(range(4), range(3), range(2), range(3))]
    chosen = covering(cases)
    assert pairs_of(cases[index] for index in chosen) == pairs_of(cases)
    assert len(chosen) < len(cases) / 3


def test_what_no_other_case_has_stays_too():
    cases = [{"a": 1, "b": 1}, {"a": 1, "b": 2}, {"a": 1, "b": 1}, {"a": 1}, {"c": 3}]
    assert covering(cases) == [0, 1, 3, 4]


def test_what_is_left_out_is_slow():
    whole = every_choice(a=[1, 2, 3], b=["x", "y"], c=[True, False]).args[1]
    quick = [dict(zip("abc", case.values, strict=True)) for case in whole if not case.marks]
    assert len(whole) == 12
    assert len(quick) < 12
    assert pairs_of(quick) == pairs_of([dict(zip("abc", case.values, strict=True)) for case in whole])


def test_each_value_has_one_turn():
    cases = in_turns(a=[1, 2, 3, 4], b=["x", "y"]).args[1]
    assert len(cases) == 8
    assert [case.values for case in cases if not case.marks] == [(1, "x"), (3, "x"), (2, "y"), (4, "y")]

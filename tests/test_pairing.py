from itertools import product

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from sdwn.reports import comparison
from sdwn.reports.comparison import difference, holm, images_differ, rates_differ

rates = st.integers(0, 10).map(lambda right: right / 10)
pairs = st.lists(st.tuples(rates, rates), min_size=2, max_size=8)


@given(pairs)
@example([(0.0, 0.1), (0.0, 0.3), (0.4, 0.0)])
@example([(0.0, 0.1), (0.0, 0.2), (0.1, 0.0), (0.2, 0.0)])
def test_p_is_the_share_of_all_ways_to_flip_signs(found):
    first, second = np.array(found).T
    change = (second - first).round(12)
    flipped = [abs(np.dot(signs, change)) for signs in product((1, -1), repeat=len(change))]
    expected = np.mean(np.array(flipped) >= abs(change.sum()) - 1e-9)
    assert difference(first, second)["p_value"] == pytest.approx(expected)


@given(pairs)
def test_the_other_way_round_is_the_same_with_its_sign_changed(found):
    first, second = np.array(found).T
    there, back = difference(first, second), difference(second, first)
    assert there["mean"] == pytest.approx(-back["mean"])
    assert (there["better"], there["worse"], there["equal"]) == (
        back["worse"],
        back["better"],
        back["equal"],
    )
    assert there["p_value"] == pytest.approx(back["p_value"])
    assert there["interval"] is not None
    assert there["interval"][0] - 1e-9 <= there["mean"] <= there["interval"][1] + 1e-9


def test_many_pairs_are_told_apart_and_equal_ones_are_not():
    random = np.random.default_rng(5)
    first = random.integers(0, 11, 6000) / 10
    noisy = first + random.normal(0, 0.2, 6000)
    assert difference(first, noisy + 0.02)["p_value"] < 1e-6
    assert difference(first, first)["p_value"] == 1


def test_both_tests_agree_where_one_takes_over_from_the_other(monkeypatch):
    monkeypatch.setattr(comparison, "RESAMPLES", 2000)
    random = np.random.default_rng(6)
    first = random.integers(0, 11, 5000) / 10
    second = first + random.normal(0.003, 0.2, 5000)
    flipped, t_test = difference(first[1:], second[1:]), difference(first, second)
    assert 0.1 < t_test["p_value"] < 0.6
    assert flipped["p_value"] == pytest.approx(t_test["p_value"], abs=0.04)


@pytest.mark.parametrize(("moved", "expected"), [([0.1], 1), ([0.1, 0.1], 0.5), ([0.2, -0.1], 1)])
def test_pairs_that_are_equal_change_nothing_about_p(moved, expected):
    equal = [0.5] * 800
    found = difference([0] * len(moved) + equal, moved + equal)
    assert found["p_value"] == pytest.approx(expected)


def test_a_single_pair_has_a_difference_and_no_certainty():
    found = difference([0.2], [0.5])
    assert (found["mean"], found["interval"], found["p_value"]) == (pytest.approx(0.3), None, None)


@given(st.lists(st.one_of(st.none(), st.floats(0, 1)), max_size=12))
def test_holm_keeps_the_order_and_multiplies_the_least_by_all(p_values):
    adjusted = holm(p_values)
    known = [(p, a) for p, a in zip(p_values, adjusted, strict=True) if p is not None]
    assert [p is None for p in p_values] == [a is None for a in adjusted]
    assert all(p <= a <= 1 for p, a in known)
    assert [a for _, a in sorted(known)] == sorted(a for _, a in known)
    if known:
        assert min(known)[1] == pytest.approx(min(1, min(known)[0] * len(known)))


def test_classes_differ_where_ten_images_can_tell():
    right, other = np.array([0, 5, 10, 10]), np.array([10, 6, 10, 0])
    ten = np.full(4, 10)
    found = rates_differ(right, ten, other, ten)
    assert (found <= 0.05).tolist() == [True, False, False, True]
    assert rates_differ(right, ten, right, ten).tolist() == [1, 1, 1, 1]


@given(st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1, max_size=30))
def test_two_judges_are_told_apart_by_what_they_disagree_about(found):
    first, second = np.array(found, dtype=bool).T
    result = images_differ(first, second)
    assert result["only_first"] == sum(a and not b for a, b in found)
    assert result["only_second"] == sum(b and not a for a, b in found)
    # The other images change nothing.
    apart = first != second
    if apart.any():
        assert images_differ(first[apart], second[apart]) == result

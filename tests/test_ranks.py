"""Hits and ranks where scores tie: against every order of the tied, by hand, and bad input.

Not for whole retrievals (eval/test_retrieval.py).
"""

from itertools import permutations
from math import comb

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from m2encoder.errors import DataError
from m2encoder.ranks import Ranks, expected_ranks, hits_at_k, ranks_of_scores

counts = st.integers(0, 60)


def ranks(*queries):
    """Ranks of queries given as (above, tied, right)."""
    return Ranks(*np.array(queries, np.int64).reshape(-1, 3).T)


def orders(above, tied, right):
    """Place, from 1, of the first right candidate in every order of those that tie."""
    group = "w" * tied + "r" * right
    return [1 + above + order.index("r") for order in permutations(group)]


@pytest.mark.parametrize("right", [1, 2, 3])
@pytest.mark.parametrize("tied", [0, 1, 2, 3, 4])
@pytest.mark.parametrize("above", [0, 2])
def test_hits_and_ranks_are_means_over_every_order_of_the_tied(above, tied, right):
    places = np.array(orders(above, tied, right))
    one = ranks((above, tied, right))
    for k in range(1, above + tied + right + 3):
        hits = hits_at_k(one, k)
        assert hits.value == pytest.approx(np.mean(places <= k), abs=1e-12)
        assert hits.low == np.min(places <= k)
        assert hits.high == np.max(places <= k)
    expected = expected_ranks(one)
    assert expected.value == pytest.approx(places.mean(), abs=1e-12)
    assert (expected.low, expected.high) == (places.min(), places.max())


@given(above=counts, tied=counts, right=st.integers(1, 60), k=st.integers(1, 200))
def test_a_hit_is_as_likely_as_the_hypergeometric_distribution_says(above, tied, right, k):
    drawn = min(max(0, k - above), tied + right)
    miss = comb(tied, drawn) / comb(tied + right, drawn)
    assert hits_at_k(ranks((above, tied, right)), k).value == pytest.approx(1 - miss, abs=1e-12)


@given(st.lists(st.tuples(counts, counts, st.integers(1, 9)), min_size=1, max_size=20))
def test_hits_never_fall_with_k_and_lie_between_their_bounds(queries):
    found = [hits_at_k(ranks(*queries), k) for k in range(1, 150)]
    for hits in found:
        assert np.all(hits.low <= hits.value)
        assert np.all(hits.value <= hits.high)
    for part in range(3):
        assert np.all(np.diff([hits[part] for hits in found], axis=0) >= 0)
    assert np.all(found[-1].low == 1)  # beyond the gallery, every query hits


def test_a_small_chance_keeps_its_digits():
    one_in_a_billion = ranks((0, 10**9 - 1, 1))
    assert hits_at_k(one_in_a_billion, 1).value == pytest.approx(1e-9, rel=1e-12)
    assert hits_at_k(one_in_a_billion, 10**6).value == pytest.approx(1e-3, rel=1e-9)


def test_many_right_answers_among_many_tied_stay_between_0_and_1():
    hits = hits_at_k(ranks((3, 20_000, 20_000), (3, 20_000, 5)), 4)
    assert hits.value == pytest.approx([0.5, 5 / 20_005], rel=1e-12)


def test_queries_are_counted_each_for_itself():
    hits = hits_at_k(ranks((0, 0, 1), (1, 0, 1), (0, 1, 1), (0, 3, 2), (9, 0, 1)), 2)
    assert hits.low.tolist() == [1, 1, 1, 0, 0]
    assert hits.value == pytest.approx([1, 1, 1, 1 - (3 * 2) / (5 * 4), 0])
    assert hits.high.tolist() == [1, 1, 1, 1, 0]


def test_no_queries_have_no_hits():
    assert hits_at_k(ranks(), 3).value.shape == (0,)


@pytest.mark.parametrize("k", [0, -1])
def test_k_below_one_is_refused(k):
    with pytest.raises(ValueError, match=f"at least 1, got {k}"):
        hits_at_k(ranks((0, 0, 1)), k)


def test_ranks_of_scores_worked_by_hand():
    scores = np.array([[0.9, 0.5, 0.1], [0.5, 0.5, 0.9], [0.3, 0.3, 0.3]], np.float32)
    found = ranks_of_scores(scores, np.array([0, 1, 2]))
    assert found.above.tolist() == [0, 1, 0]
    assert found.tied.tolist() == [0, 1, 2]
    assert found.right.tolist() == [1, 1, 1]


@given(st.data())
def test_ranks_of_scores_equal_a_count_class_by_class(data):
    num_classes = data.draw(st.integers(1, 6))
    row = st.lists(st.integers(-2, 2), min_size=num_classes, max_size=num_classes)
    scores = data.draw(st.lists(row, min_size=1, max_size=9))
    targets = data.draw(
        st.lists(st.integers(0, num_classes - 1), min_size=len(scores), max_size=len(scores))
    )
    found = ranks_of_scores(np.array(scores, np.float32), np.array(targets))
    for i, target in enumerate(targets):
        assert found.above[i] == sum(score > scores[i][target] for score in scores[i])
        assert found.tied[i] == sum(score == scores[i][target] for score in scores[i]) - 1


@pytest.mark.parametrize(
    ("scores", "targets", "error", "message"),
    [
        ([[0.0, np.nan], [0, 1]], [0, 1], DataError, "1 of 2 rows hold NaN .* first is row 0"),
        ([[0.0, 1], [np.inf, 1]], [0, 1], DataError, "first is row 1"),
        (np.zeros((0, 3)), np.zeros(0, int), DataError, "0 labelled pictures and 3 classes"),
        (np.zeros((3, 0)), [0, 0, 0], DataError, "3 labelled pictures and 0 classes"),
        ([[0.0, 1]], [2], ValueError, "targets reach from 2 to 2, expected 0 to 1"),
        ([[0.0, 1]], [-1], ValueError, "expected 0 to 1"),
        ([[0.0, 1]], [0, 1], ValueError, r"targets \(2,\)"),
        ([[0.0, 1]], [0.0], ValueError, "targets are float64"),
    ],
)
def test_wrong_scores_are_refused(scores, targets, error, message):
    with pytest.raises(error, match=message):
        ranks_of_scores(scores, targets)

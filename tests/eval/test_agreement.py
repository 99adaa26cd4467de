"""How far two lists of scores agree, against loops over every order and every pair.

Not for captions and pictures: test_bilingual.py.
"""

from collections import Counter
from itertools import combinations, permutations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from m2encoder.eval.agreement import kendall, overlap_at_k, spearman


def orders(scores, k):
    """Count each set of k best items over every order that the scores allow."""
    found = Counter()
    for places in permutations(range(len(scores))):
        found[frozenset(sorted(places, key=lambda item: -scores[item])[:k])] += 1
    return found


def overlap_by_hand(a, b, k):
    shares = [
        (len(top_a & top_b) / k, count_a * count_b)
        for top_a, count_a in orders(a, k).items()
        for top_b, count_b in orders(b, k).items()
    ]
    total = sum(count for _, count in shares)
    values = [share for share, _ in shares]
    return min(values), sum(share * count for share, count in shares) / total, max(values)


def kendall_by_hand(a, b):
    agree = in_a = in_b = 0
    for i, j in combinations(range(len(a)), 2):
        order_a, order_b = np.sign(a[i] - a[j]), np.sign(b[i] - b[j])
        agree, in_a, in_b = agree + order_a * order_b, in_a + order_a**2, in_b + order_b**2
    return agree / np.sqrt(in_a * in_b) if in_a and in_b else np.nan


def spearman_by_hand(a, b):
    ranks = [
        [sum(y < x for y in row) + (sum(y == x for y in row) - 1) / 2 for x in row]
        for row in (a, b)
    ]
    if min(np.std(row) for row in ranks) == 0:
        return np.nan
    return float(np.corrcoef(np.asarray(ranks))[0, 1])


rows = st.integers(1, 5).flatmap(
    lambda n: st.tuples(*[st.lists(st.integers(0, 3), min_size=n, max_size=n)] * 2)
)


@given(rows)
@settings(max_examples=60, deadline=None)
def test_overlap_equals_every_order_of_ties(lists):
    a, b = (np.asarray([row], np.float64) for row in lists)
    for k in range(1, a.shape[1] + 1):
        found = [float(each[0]) for each in overlap_at_k(a, b, k)]
        assert found == pytest.approx(overlap_by_hand(a[0], b[0], k))


@given(rows)
@settings(max_examples=100, deadline=None)
def test_correlations_equal_loops_over_pairs(lists):
    a, b = (np.asarray([row], np.float64) for row in lists)
    assert kendall(a, b)[0] == pytest.approx(kendall_by_hand(a[0], b[0]), nan_ok=True)
    assert spearman(a, b)[0] == pytest.approx(spearman_by_hand(a[0], b[0]), nan_ok=True)


def test_correlations_of_long_rows_equal_loops():
    rng = np.random.default_rng(0)
    a, b = rng.integers(0, 40, (2, 3, 97)).astype(np.float32)
    assert kendall(a, b) == pytest.approx(
        [kendall_by_hand(*pair) for pair in zip(a, b, strict=True)]
    )
    assert spearman(a, b) == pytest.approx(
        [spearman_by_hand(*pair) for pair in zip(a, b, strict=True)]
    )


def test_worked_by_hand():
    a = np.asarray([[0.9, 0.8, 0.1, 0.0]])
    b = np.asarray([[0.9, 0.1, 0.8, 0.0]])
    assert overlap_at_k(a, b, 1).value.tolist() == [1.0]
    assert overlap_at_k(a, b, 2).value.tolist() == [0.5]
    assert kendall(a, b)[0] == pytest.approx(4 / 6)  # one of six pairs is turned round
    assert spearman(a, b)[0] == pytest.approx(1 - 6 * 2 / (4 * 15))


def test_the_same_list_agrees_wholly_and_the_reverse_not_at_all():
    scores = np.random.default_rng(1).standard_normal((4, 50))
    assert overlap_at_k(scores, scores, 7).value.tolist() == [1.0] * 4
    for correlate in (spearman, kendall):
        assert correlate(scores, scores) == pytest.approx([1.0] * 4)
        assert correlate(scores, -scores) == pytest.approx([-1.0] * 4)


def test_lists_that_tie_everything_share_what_chance_does():
    flat = np.zeros((1, 20))
    low, value, high = overlap_at_k(flat, flat, 5)
    assert (low[0], value[0], high[0]) == pytest.approx((0, 5 / 20, 1))
    assert np.isnan(spearman(flat, flat)).all()
    assert np.isnan(kendall(flat, flat)).all()


@pytest.mark.parametrize("k", [0, 5])
def test_a_k_outside_of_the_gallery_is_refused(k):
    with pytest.raises(ValueError, match=rf"k is {k}, expected 1 to 4"):
        overlap_at_k(np.zeros((2, 4)), np.zeros((2, 4)), k)


def test_lists_of_different_items_are_refused():
    with pytest.raises(ValueError, match="expected the same"):
        overlap_at_k(np.zeros((2, 4)), np.zeros((2, 5)), 1)

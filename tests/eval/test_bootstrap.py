"""Intervals against plain loops and theory, clusters, paired comparisons, McNemar by hand.

Not for which values are drawn (test_retrieval.py, test_classification.py).
"""

from math import comb, erfc, sqrt

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from m2encoder.eval import bootstrap as module
from m2encoder.eval.bootstrap import (
    Resamples,
    bootstrap_means,
    interval,
    mcnemar,
    mean_interval,
    median_interval,
    paired_bootstrap,
    paired_bootstrap_of_groups,
)


def ragged(seed, num_clusters, most=6):
    """Values of queries, and the cluster of each; every cluster has at least one."""
    rng = np.random.default_rng(seed)
    clusters = np.repeat(np.arange(num_clusters), rng.integers(1, most + 1, num_clusters))
    return rng.integers(0, 30, len(clusters)).astype(np.float64), clusters


def drawn_weights(resamples):
    """(R, C) how often each draw takes each cluster."""
    return resamples.sums(np.eye(resamples.num_clusters)).astype(int)


def drawn_queries(resamples, values, clusters):
    """Per draw the values of its clusters, one by one."""
    for weights in drawn_weights(resamples):
        yield np.repeat(values, weights[clusters])


def test_every_draw_takes_as_many_clusters_as_there_are_each_as_likely():
    weights = drawn_weights(Resamples(50, draws=4000))
    assert np.all(weights.sum(axis=1) == 50)
    # The mean of a weight is 1, its variance 49/50; five standard errors over 4,000 draws.
    assert weights.mean(axis=0) == pytest.approx(np.ones(50), abs=5 / sqrt(4000))
    assert weights.var() == pytest.approx(49 / 50, rel=0.03)


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), num_clusters=st.integers(1, 20))
def test_means_equal_those_of_queries_drawn_one_by_one(seed, num_clusters):
    values, clusters = ragged(seed, num_clusters)
    resamples = Resamples(num_clusters, draws=20, seed=seed)
    for scale in (1.0, 1 / 7, 2.0**24 + 1):  # whole numbers, shares, too large for float32
        both = scale * np.stack([values, values**2], axis=1)
        means = bootstrap_means(both, clusters, resamples)
        for row, drawn in zip(means, drawn_queries(resamples, values, clusters), strict=True):
            expected = [scale * drawn.mean(), scale * (drawn**2).mean()]
            assert row == pytest.approx(expected, rel=1e-12)


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    num_clusters=st.integers(1, 40),
    spread=st.sampled_from([1, 1000]),
)
def test_the_interval_of_a_median_equals_that_of_every_draws_median(seed, num_clusters, spread):
    values, clusters = ragged(seed, num_clusters)
    values = np.floor(values * spread / 30 + np.random.default_rng(seed).random(len(values)))
    resamples = Resamples(num_clusters, draws=200, seed=seed)
    medians = np.sort(
        [
            np.quantile(drawn, 0.5, method="inverted_cdf")
            for drawn in drawn_queries(resamples, values, clusters)
        ]
    )
    assert median_interval(values, clusters, resamples) == (medians[4], medians[194])


@pytest.mark.parametrize("block", [1, 7, 1000])
def test_draws_made_in_parts_and_again_are_the_same(monkeypatch, block):
    monkeypatch.setattr(module, "BLOCK", 12 * block)
    monkeypatch.setattr(module, "KEPT_BYTES", 0)
    values, clusters = ragged(1, 12)
    resamples = Resamples(12, draws=30, seed=5)
    first = bootstrap_means(values, clusters, resamples)
    assert np.array_equal(first, bootstrap_means(values, clusters, resamples))
    assert len(np.unique(first)) > 20
    same = Resamples(12, draws=30, seed=5)
    assert np.array_equal(first, bootstrap_means(values, clusters, same))


def test_an_interval_is_as_wide_as_theory_says():
    values = (np.arange(2000) % 4 == 0).astype(float)
    low, high = mean_interval(values, draws=4000) or (0, 0)
    expected = 1.96 * sqrt(0.25 * 0.75 / 2000)
    assert (high - low) / 2 == pytest.approx(expected, rel=0.05)
    assert (high + low) / 2 == pytest.approx(0.25, abs=expected / 10)


def test_queries_that_fail_together_widen_the_interval():
    """Five captions of a picture that all hit or all miss say no more than one."""
    one_each = (np.arange(400) % 2).astype(float)
    clusters = np.repeat(np.arange(400), 5)
    alone = mean_interval(one_each) or (0, 0)
    together = mean_interval(np.repeat(one_each, 5), clusters) or (0, 0)
    independent = mean_interval(np.repeat(one_each, 5)) or (0, 0)
    assert together == alone
    assert independent[1] - independent[0] < 0.6 * (alone[1] - alone[0])


def test_one_cluster_has_no_interval():
    assert mean_interval([1.0, 0.0], [7, 7]) is None
    assert mean_interval([1.0, 0.0], [7, 8]) is not None


def test_draws_that_gave_nothing_are_left_out_of_an_interval():
    assert interval([np.nan, 1.0, 1.0]) == (1.0, 1.0)
    assert interval([np.nan]) is None


def test_a_pair_of_models_is_compared_on_the_same_draws():
    """The models differ on few queries, so their difference is surer than either's mean."""
    rng = np.random.default_rng(0)
    first = (rng.random(1000) < 0.5).astype(float)
    second = first.copy()
    second[:30] = 0
    found = paired_bootstrap(first, second)
    assert found.difference == pytest.approx(first[:30].sum() / 1000)
    assert found.n == 1000
    low, high = found.ci95 or (0, 0)
    assert 0 < low < found.difference < high
    single = mean_interval(first) or (0, 0)
    assert high - low < 0.5 * (single[1] - single[0])


def test_a_model_does_not_differ_from_itself():
    assert paired_bootstrap([0.2, 1, 0], [0.2, 1, 0])[:2] == (0.0, (0.0, 0.0))


def test_exchanging_the_models_turns_the_difference_round():
    first, clusters = ragged(2, 40)
    second = ragged(3, 40)[0].repeat(2)[: len(first)]
    one = paired_bootstrap(first, second, clusters)
    other = paired_bootstrap(second, first, clusters)
    assert other.difference == pytest.approx(-one.difference)
    assert other.ci95 == pytest.approx(tuple(-x for x in reversed(one.ci95 or ())))


def test_a_mean_recall_is_compared_over_both_directions():
    i2t, t2i = [np.array([1.0, 0, 1]), np.zeros(3)], [np.array([1.0, 1, 0, 1]), np.zeros(4)]
    clusters = [np.array([4, 7, 9]), np.array([4, 4, 7, 9])]
    first, second = zip(i2t, t2i, strict=True)
    found = paired_bootstrap_of_groups(first, second, clusters)
    assert found.difference == pytest.approx((2 / 3 + 3 / 4) / 2)
    assert found.n == 7
    twice = paired_bootstrap_of_groups(2 * [i2t[0]], 2 * [i2t[1]], 2 * [clusters[0]])
    assert twice == paired_bootstrap(*i2t)._replace(n=6)


@pytest.mark.parametrize(("first", "second"), [([1.0, 0.0], [1.0]), ([], []), ([[1.0]], [[1.0]])])
def test_other_queries_are_refused(first, second):
    with pytest.raises(ValueError, match="expected the same queries, at least one"):
        paired_bootstrap(first, second)


def test_clusters_must_be_one_for_each_query():
    with pytest.raises(ValueError, match=r"shape \(2,\), expected one for each of 3"):
        bootstrap_means(np.ones(3), [0, 1], Resamples(2))


@pytest.mark.parametrize(("num_clusters", "draws"), [(0, 5), (5, 0)])
def test_nothing_to_draw_is_refused(num_clusters, draws):
    with pytest.raises(ValueError, match=f"{num_clusters} clusters and {draws} draws"):
        Resamples(num_clusters, draws=draws)


def answers(only_first, only_second, both=3, neither=2):
    """Right and wrong answers of two models with that many of each kind."""
    first = [1] * only_first + [0] * only_second + [1] * both + [0] * neither
    second = [0] * only_first + [1] * only_second + [1] * both + [0] * neither
    return np.array(first, bool), np.array(second, bool)


@pytest.mark.parametrize(
    ("only_first", "only_second", "p_value"),
    [
        (0, 0, 1.0),
        (1, 1, 1.0),
        (5, 0, 2 / 32),  # both tails of five equal coins
        (1, 8, 2 * (1 + 9) / 512),
        (10, 2, 2 * (1 + 12 + 66) / 4096),
    ],
)
def test_mcnemar_worked_by_hand(only_first, only_second, p_value):
    found = mcnemar(*answers(only_first, only_second))
    assert found[:2] == (only_first, only_second)
    assert found.p_value == pytest.approx(p_value, rel=1e-12)


@given(st.integers(0, 300), st.integers(0, 300))
def test_mcnemar_is_the_exact_binomial_test_and_knows_no_first(only_first, only_second):
    n, few = only_first + only_second, min(only_first, only_second)
    exact = min(1.0, 2 * sum(comb(n, i) for i in range(few + 1)) / 2**n)
    found = mcnemar(*answers(only_first, only_second))
    assert found.p_value == pytest.approx(exact, rel=1e-9)
    assert mcnemar(*answers(only_second, only_first)).p_value == found.p_value


def test_mcnemar_takes_very_many_answers():
    z = (1000 - 1) / sqrt(25_000)  # the normal approximation with continuity correction
    p_value = mcnemar(*answers(12_000, 13_000)).p_value
    assert p_value == pytest.approx(erfc(z / sqrt(2)), rel=0.02)


@pytest.mark.parametrize("wrong", [np.array([0.5, 1.0]), np.array([0, 1]), np.array([True])])
def test_mcnemar_wants_right_or_wrong(wrong):
    with pytest.raises(ValueError, match="expected right or wrong"):
        mcnemar(np.array([True, False]), wrong)

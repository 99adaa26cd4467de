"""Recall by hand and against brute force, ties, kinds of right answers, intervals, bad input.

Not for ranks alone (test_exact_ranks.py), nor for what is fed into it (test_suite.py).
"""

from itertools import permutations
from math import comb

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from retrieval_cases import as_tuples, owned, small_cases, true_ranks, true_scores, unit_case
from torch import tensor

from m2encoder.errors import ConfigError, DataError
from m2encoder.eval.bootstrap import mean_interval
from m2encoder.eval.retrieval import (
    RetrievalSettings,
    measure_retrieval,
    ranks_of_matrix,
    recall_at_k,
    retrieval_metrics,
    retrieval_ranks,
)

RECALLS = [f"{direction}_r{k}" for direction in ("i2t", "t2i") for k in (1, 5, 10)]


def one_hit_in(num_wrong, num_right, k):
    """The chance that one of the right is among k drawn at random."""
    return 1 - comb(num_wrong, k) / comb(num_wrong + num_right, k)


def test_recall_counts_any_of_several_captions():
    sim_IT = tensor([[0.9, 0.1, 0.8], [0.2, 0.7, 0.3]])  # image 0 owns texts 0 and 2
    assert recall_at_k(sim_IT, owner=tensor([0, 1, 0]), k=1) == {"i2t": 1.0, "t2i": 1.0}


def test_recall_worked_by_hand_where_some_miss():
    sim_IT = np.array([[0.5, 0.9, 0.1], [0.6, 0.2, 0.3], [0.4, 0.1, 0.8]])
    # image 0: text 1 is wrongly first; image 1: both others before; image 2: right
    # text 0: image 1 before; text 1: image 0 before, 2 behind; text 2: right
    ranks = ranks_of_matrix(sim_IT, owner=[0, 1, 2])
    assert as_tuples(ranks.i2t) == [(1, 0, 1), (2, 0, 1), (0, 0, 1)]
    assert as_tuples(ranks.t2i) == [(1, 0, 1), (1, 0, 1), (0, 0, 1)]
    assert recall_at_k(sim_IT, owner=[0, 1, 2], k=2) == {"i2t": pytest.approx(2 / 3), "t2i": 1.0}


def test_a_later_caption_alone_makes_a_hit():
    sim_IT = np.array([[0.1, 0.9, 0.5], [0.0, 0.6, 0.4]])  # image 0 owns texts 0 and 1
    assert recall_at_k(sim_IT, owner=[0, 0, 1], k=1)["i2t"] == 0.5


def test_own_captions_do_not_stand_in_each_others_way():
    sim_IT = np.array([[0.9, 0.9, 0.8], [0.1, 0.1, 0.9]])
    assert as_tuples(ranks_of_matrix(sim_IT, owner=[0, 0, 1]).i2t) == [(0, 0, 2), (0, 0, 1)]


def test_a_tie_counts_as_its_chance():
    sim_IT = np.array([[0.5, 0.5], [0.1, 0.6]])
    assert recall_at_k(sim_IT, owner=[0, 1], k=1) == {"i2t": 0.75, "t2i": 1.0}
    assert recall_at_k(sim_IT, owner=[0, 1], k=2) == {"i2t": 1.0, "t2i": 1.0}


def test_an_image_without_text_is_no_query_but_stands_in_the_way():
    image = np.array([[1, 0], [0, 1], [0.8, 0.6]], np.float32)
    text = np.array([[0.8, 0.6], [0, 1]], np.float32)
    ranks = retrieval_ranks(image, text, np.array([0, 1]))
    assert as_tuples(ranks.t2i) == [(1, 0, 1), (0, 0, 1)]
    assert ranks.i2t_image.tolist() == [0, 1]
    found = measure_retrieval(image, text, np.array([0, 1]))
    assert found.details["images_without_text"] == 1
    assert found.details["captions_per_image"] == {"0": 1, "1": 2}
    assert found.metrics["i2t_r1"].n == 2


def test_one_pair_is_always_found_and_has_no_interval():
    one = np.array([[1.0, 0.0]], np.float32)
    found = measure_retrieval(one, one, [0]).metrics
    assert found["i2t_r1"].value == found["t2i_r1"].value == 1.0
    assert found["mean_recall"].ci95 is None
    assert retrieval_metrics(one, one, [0])["rsum"] == 600.0


@settings(max_examples=100, deadline=None)
@given(case=small_cases(), ks=st.sets(st.integers(1, 25), min_size=1, max_size=3))
def test_metrics_equal_brute_force(case, ks):
    image, text, owner = case
    ks = tuple(sorted(ks))
    scores, right = true_scores(image, text), owned(owner, len(image))
    found = measure_retrieval(image, text, owner, settings=RetrievalSettings(ks=ks, draws=3))
    for direction, turned, right_ones in (("i2t", scores, right), ("t2i", scores.T, right.T)):
        ranks = true_ranks(turned, right_ones)
        for k in ks:
            chances = [
                one_hit_in(tied, own, k - above) if 0 < k - above <= tied else k > above
                for above, tied, own in ranks
            ]
            metric = found.metrics[f"{direction}_r{k}"]
            assert metric.value == pytest.approx(np.mean(chances), abs=1e-12)
            low = np.mean([above + tied < k for above, tied, _ in ranks])
            high = np.mean([above < k for above, _, _ in ranks])
            assert (metric.tie_low, metric.tie_high) == (
                (None, None) if low == high else (pytest.approx(low), pytest.approx(high))
            )
        median = np.median([1 + above + tied / (own + 1) for above, tied, own in ranks])
        assert found.metrics[f"{direction}_median_rank"].value == pytest.approx(median)


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), k=st.integers(1, 5))
def test_the_value_is_the_mean_over_every_order_of_the_candidates(seed, k):
    """Sort all candidates of a query stably, after each order that they may come in."""
    rng = np.random.default_rng(seed)
    image, text = rng.integers(-1, 2, (5, 2)), rng.integers(-1, 2, (5, 2))
    owner = rng.integers(5, size=5)
    scores, right = (image @ text.T).T, owned(owner, 5).T
    hits = [
        right[:, order][query, np.argsort(-scores[query, order], kind="stable")[:k]].any()
        for order in map(list, permutations(range(5)))
        for query in range(5)
    ]
    recall = measure_retrieval(image, text, owner, settings=RetrievalSettings(ks=(k,), draws=2))
    assert recall.metrics[f"t2i_r{k}"].value == pytest.approx(np.mean(hits), abs=1e-12)


@given(seed=st.integers(0, 2**32 - 1))
@settings(max_examples=50, deadline=None)
def test_a_matrix_and_its_embeddings_give_the_same_recall(seed):
    image, text, owner = unit_case(seed, 9, 15)
    metrics = retrieval_metrics(image, text, owner)
    for k in (1, 5, 10):
        recall = recall_at_k(true_scores(image, text), owner=owner, k=k)
        assert recall == pytest.approx({"i2t": metrics[f"i2t_r{k}"], "t2i": metrics[f"t2i_r{k}"]})


@given(case=small_cases())
@settings(max_examples=50, deadline=None)
def test_recall_never_falls_as_k_grows(case):
    image, text, owner = case
    metrics = retrieval_metrics(image, text, owner, ks=(1, 2, 3, 5, 8, 20))
    for direction in ("i2t", "t2i"):
        recalls = [metrics[f"{direction}_r{k}"] for k in (1, 2, 3, 5, 8, 20)]
        assert recalls == sorted(recalls)
        assert recalls[-1] == 1.0  # no gallery here is larger


@given(seed=st.integers(0, 2**32 - 1), distinct=st.sampled_from([None, 9]))
@settings(max_examples=50, deadline=None)
def test_permuting_images_and_texts_permutes_their_ranks(seed, distinct):
    image, text, owner = unit_case(seed, 12, 20, distinct=distinct)
    rng = np.random.default_rng(seed)
    images, texts = rng.permutation(12), rng.permutation(20)
    ranks = retrieval_ranks(image, text, owner)
    moved = retrieval_ranks(image[images], text[texts], np.argsort(images)[owner[texts]])
    assert as_tuples(moved.t2i) == [as_tuples(ranks.t2i)[t] for t in texts]
    by_image = dict(zip(ranks.i2t_image.tolist(), as_tuples(ranks.i2t), strict=True))
    assert as_tuples(moved.i2t) == [by_image[i] for i in images[moved.i2t_image]]


@pytest.mark.parametrize("num_images", [40, 1200])
def test_a_collapsed_text_tower_scores_chance_between_0_and_1(num_images):
    """Three captions each, all with one vector: guessing is all that is left."""
    image, text, _ = unit_case(0, num_images, 1)
    owner = np.repeat(np.arange(num_images), 3)
    found = measure_retrieval(image, np.repeat(text, len(owner), axis=0), owner).metrics
    for k in (1, 5, 10):
        i2t = found[f"i2t_r{k}"]
        assert i2t.value == pytest.approx(one_hit_in(len(owner) - 3, 3, k), abs=1e-12)
        assert (i2t.tie_low, i2t.tie_high) == (0.0, 1.0)
    assert found["t2i_r1"].value == pytest.approx(1 / num_images)
    assert found["t2i_r1"].tie_low is None  # all texts rank all images alike: no ties
    assert found["i2t_r1"].value == pytest.approx(1 / num_images)
    median = found["i2t_median_rank"]
    assert (median.tie_low, median.tie_high) == (1, len(owner) - 2)
    assert median.value == 1 + (len(owner) - 3) / 4


def test_a_collapsed_model_scores_chance_both_ways():
    same = np.full((50, 8), 8**-0.5, np.float32)
    found = measure_retrieval(same, same, np.arange(50)).metrics
    assert [found[name].value for name in RECALLS] == pytest.approx(2 * [0.02, 0.1, 0.2])
    assert found["rsum"].value == pytest.approx(0.64)
    assert (found["mean_recall"].tie_low, found["mean_recall"].tie_high) == (0.0, 1.0)


def test_mean_recall_and_rsum_are_of_what_was_measured():
    image, text, owner = unit_case(4, 30, 70)
    both = measure_retrieval(image, text, owner)
    recalls = [both.metrics[name].value for name in RECALLS]
    assert both.metrics["mean_recall"].value == pytest.approx(np.mean(recalls))
    assert both.metrics["rsum"].value == pytest.approx(np.sum(recalls))
    assert both.details["mean_recall"] == f"mean of the 6 recalls {', '.join(RECALLS)}"
    one_way = RetrievalSettings(directions=("t2i",))
    one = measure_retrieval(image, text, owner, settings=one_way)
    assert one.metrics["mean_recall"] == both.metrics["t2i_mean_recall"]
    assert one.metrics["mean_recall"].value == pytest.approx(np.mean(recalls[3:]))
    assert one.details["mean_recall"].startswith("mean of the 3 recalls t2i_r1,")
    assert not any(name.startswith("i2t") for name in [*one.metrics, *one.ranks])


def test_intervals_lie_around_values_and_narrow_with_more_images():
    widths = []
    for num_images in (50, 800):
        image, text, owner = unit_case(7, num_images, 3 * num_images, dim=32)
        text = image[owner] + 2 * text
        found = measure_retrieval(image, text, owner).metrics
        for metric in found.values():
            assert metric.ci95 is not None
            assert metric.ci95[0] <= metric.value <= metric.ci95[1]
        low, high = found["t2i_r1"].ci95 or (0, 0)
        widths.append(high - low)
    assert widths[1] < widths[0] / 2


def test_captions_of_an_image_are_drawn_together():
    """Five captions of an image that all hit, or all miss, say as much as one."""
    image = np.eye(39)
    owner = np.repeat(np.arange(39), 5)
    target = np.where(owner % 3, owner, owner + 1)  # captions of every third image are wrong
    found = measure_retrieval(image, image[target], owner).metrics["t2i_r1"]
    assert found.value == pytest.approx(2 / 3)
    assert found.ci95 == pytest.approx(mean_interval(np.arange(39) % 3 > 0))


def test_draws_without_any_text_are_left_out():
    found = measure_retrieval(np.eye(3)[:2], np.eye(3)[:1], [0], also=[(0, 1)])
    assert found.metrics["t2i_r1"].ci95 == found.metrics["i2t_r1"].ci95 == (1.0, 1.0)


def test_intervals_are_seeded():
    image, text, owner = unit_case(1, 40, 90)
    first, again, other = (
        measure_retrieval(image, text, owner, settings=RetrievalSettings(seed=seed)).metrics
        for seed in (3, 3, 4)
    )
    assert first == again
    assert first["mean_recall"].ci95 != other["mean_recall"].ci95


def test_ranks_are_kept_per_query_with_their_image():
    image, text, owner = unit_case(6, 7, 11)
    found = measure_retrieval(image, text, owner)
    ranks = retrieval_ranks(image, text, owner)
    names = [f"{d}_{part}" for d in ("i2t", "t2i") for part in ("above", "tied", "right", "image")]
    assert sorted(found.ranks) == sorted(names)
    assert np.array_equal(found.ranks["t2i_above"], ranks.t2i.above)
    assert np.array_equal(found.ranks["t2i_image"], owner)
    assert np.array_equal(found.ranks["i2t_image"], np.unique(owner))


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_embeddings_that_are_not_finite_are_named(bad):
    image, text, owner = unit_case(0, 4, 4)
    text[2, 1] = bad
    with pytest.raises(DataError, match=r"text embeddings: 1 of 4 rows .* first is row 2"):
        retrieval_metrics(image, text, owner)


def test_similarities_that_are_not_finite_are_named():
    with pytest.raises(DataError, match=r"similarities: 1 of 2 rows .* first is row 1"):
        recall_at_k(np.array([[0.0, 1], [np.nan, 1]]), owner=[0, 1], k=1)


def test_vectors_too_long_for_float32_are_refused():
    with pytest.raises(DataError, match=r"image embeddings: the longest has length 1e\+20.*norm"):
        retrieval_metrics(np.array([[1e20, 0.0]]), np.eye(2), [0, 0])


@pytest.mark.parametrize(("num_images", "num_texts"), [(0, 3), (3, 0), (0, 0)])
def test_empty_sets_are_refused(num_images, num_texts):
    with pytest.raises(DataError, match=f"{num_images} images and {num_texts} texts"):
        retrieval_metrics(np.zeros((num_images, 2)), np.zeros((num_texts, 2)), [0] * num_texts)


@pytest.mark.parametrize(("owner", "first"), [([0, 2], 1), ([-1, 0], 0)])
def test_captions_without_an_image_are_refused(owner, first):
    with pytest.raises(
        DataError, match=f"1 of 2 have no image, the first is row {first} .* 0 to 1"
    ):
        retrieval_metrics(np.eye(2), np.eye(2), owner)


@pytest.mark.parametrize("owner", [[0], [[0, 1]], [0.0, 1.0]])
def test_an_owner_of_the_wrong_shape_or_type_is_refused(owner):
    with pytest.raises(ValueError, match="expected one integer for each of 2 texts"):
        recall_at_k(np.eye(2), owner=owner, k=1)


def test_embeddings_of_different_width_are_refused():
    with pytest.raises(ValueError, match=r"\(2, 3\) and \(2, 2\)"):
        retrieval_metrics(np.zeros((2, 3)), np.zeros((2, 2)), [0, 1])


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"ks": ()}, r"ks is \(\)"),
        ({"ks": (0, 1)}, r"ks is \(0, 1\)"),
        ({"ks": (5, 5)}, r"ks is \(5, 5\), expected different numbers"),
        ({"directions": ()}, r"directions is \(\)"),
        ({"directions": ("t2t",)}, "expected i2t, t2i or both"),
        ({"gt": "image"}, "gt is 'image', expected index, string or m2"),
        ({"draws": 0}, "draws is 0"),
    ],
)
def test_wrong_settings_are_refused(wrong, message):
    with pytest.raises(ConfigError, match=message):
        RetrievalSettings(**wrong)


def test_k_below_one_is_refused():
    with pytest.raises(ValueError, match="at least 1, got 0"):
        recall_at_k(np.eye(2), owner=[0, 1], k=0)

"""Thresholds and AUROC of "nothing fits": by hand, by loops over every score, by property.

Not for the file that keeps them: tests/test_calibration.py.
"""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from m2encoder.embed import PairEmbeddings, TextEmbeddings, embed_pairs
from m2encoder.errors import ConfigError, DataError
from m2encoder.eval.calibrate import (
    QueryScores,
    auroc,
    calibrate,
    choose_threshold,
    measure_calibration,
    query_scores,
)
from m2encoder.shards import ShardReader

DRAWS = 50
EYE = np.eye(3, dtype=np.float32)
numbers = st.lists(st.integers(0, 6).map(float), min_size=1, max_size=8).map(np.asarray)


def scores_of(right, wrong, best=None, cluster=None):
    right, wrong = np.asarray(right, np.float64), np.asarray(wrong, np.float64)
    best = np.maximum(right, wrong) if best is None else best
    cluster = np.arange(len(right)) if cluster is None else cluster
    return QueryScores(right, best, wrong, cluster, 0)


# ── thresholds ──────────────────────────────────────────────────────────────────────────────────


def test_worked_by_hand():
    """From 0.6 on: 3 matches and 1 other, a precision of 0.75. From 0.4 on 4 and 2."""
    match, no_match = np.asarray([0.9, 0.8, 0.6, 0.4]), np.asarray([0.7, 0.4, 0.2, 0.1])
    choice = choose_threshold(match, no_match, 0.75)
    assert choice.threshold == pytest.approx((0.4 + 0.6) / 2)
    assert (choice.precision, choice.recall) == (0.75, 0.75)
    assert choose_threshold(match, no_match, 0.95, least=1)[1:] == (1.0, 0.5)
    assert auroc(match, no_match) == (4 + 4 + 3 + 2.5) / 16


def test_a_precision_out_of_reach_gives_the_best_there_is():
    choice = choose_threshold(np.asarray([0.5, 0.3]), np.asarray([0.9, 0.1]), 0.95, least=1)
    assert choice.threshold is None
    assert (choice.precision, choice.recall) == (2 / 3, 1.0)


@pytest.mark.parametrize(
    ("precision", "needed"), [(0.5, 2), (0.8, 5), (0.95, 20), (0.99, 100), (1.0, 100)]
)
def test_a_precision_needs_so_many_pairs_that_one_mistake_is_allowed(precision, needed):
    """One pair at the top is right whatever the model is; it must not become the threshold."""
    for count, reached in ((needed - 1, False), (needed, True)):
        match = np.concatenate([0.5 + np.arange(count) / 1_000, np.zeros(500)])
        choice = choose_threshold(match, np.full(600, 0.1), precision)
        assert (choice.threshold is not None and choice.threshold > 0.1) == reached


def test_with_few_pairs_all_of_them_are_what_was_reached():
    choice = choose_threshold(np.asarray([0.9, 0.2]), np.asarray([0.1]), 0.95)
    assert choice == (None, 2 / 3, 1.0)


@given(numbers, numbers, st.sampled_from([0.3, 0.5, 0.75, 0.95, 1.0]), st.integers(1, 6))
@settings(max_examples=200, deadline=None)
def test_the_threshold_is_the_lowest_of_all_that_suffice(match, no_match, precision, least):
    found = {}
    everything = np.concatenate([match, no_match])
    for score in np.unique(everything):
        hits, misses = np.sum(match >= score), np.sum(no_match >= score)
        if hits + misses >= least or score == everything.min():
            found[score] = hits / (hits + misses)
    choice = choose_threshold(match, no_match, precision, least=least)
    if len(everything) < least:
        assert choice == (None, found[everything.min()], 1.0)
        return
    enough = [score for score, share in found.items() if share >= precision]
    if not enough:
        assert choice.threshold is None
        assert choice.precision == max(found.values())
        return
    assert choice.precision == found[min(enough)]
    below = [score for score in everything if score < min(enough)]
    assert choice.threshold is not None
    assert max(below, default=-1) < choice.threshold <= min(enough)
    assert choice.recall == np.mean(match >= choice.threshold)


@given(numbers, numbers)
@settings(max_examples=100, deadline=None)
def test_auroc_equals_every_pair(match, no_match):
    pairs = [(m > n) + 0.5 * (m == n) for m in match for n in no_match]
    assert auroc(match, no_match) == pytest.approx(np.mean(pairs))
    assert auroc(no_match, match) == pytest.approx(1 - np.mean(pairs))


@pytest.mark.parametrize("precision", [0, -1, 1.01, float("nan")])
def test_a_precision_that_is_no_share_is_refused(precision):
    with pytest.raises(ValueError, match="expected more than 0, at most 1"):
        choose_threshold(np.ones(1), np.zeros(1), precision)


def test_without_scores_there_is_no_threshold():
    with pytest.raises(ValueError, match="0 matches and 1 others"):
        choose_threshold(np.zeros(0), np.zeros(1), 0.9)


# ── scores of queries ───────────────────────────────────────────────────────────────────────────


def test_scores_with_and_without_the_right_picture():
    text = np.asarray([[1, 0.5, 0], [0, 0.2, 0.9]], np.float32)
    found = query_scores(EYE, text, np.asarray([0, 1]), ["一只猫", "a dog"])
    assert found.right.tolist() == pytest.approx([1, 0.2])
    assert found.best.tolist() == pytest.approx([1, 0.9])
    assert found.wrong.tolist() == pytest.approx([0.5, 0.9])


def test_pictures_with_the_same_text_are_no_mistakes():
    text = np.asarray([[0.9, 1, 0.1]] * 2, np.float32)
    found = query_scores(EYE, text, np.asarray([0, 1]), ["两只猫", "两只猫"])
    assert found.right.tolist() == [1, 1]
    assert found.wrong.tolist() == pytest.approx([0.1, 0.1])


def test_scores_equal_a_loop_over_a_matrix_in_many_blocks():
    rng = np.random.default_rng(0)
    image, text = rng.standard_normal((2, 2_500, 3)).astype(np.float32)
    owner = rng.integers(0, 2_500, 2_500)
    texts = [f"第{i % 700}句" for i in range(2_500)]
    found = query_scores(image, text, owner, texts)
    for q in range(0, 2_500, 50):
        row = (image.astype(np.float64) @ text[q].astype(np.float64)).astype(np.float32)
        right = np.isin(np.arange(2_500), owner[q % 700 :: 700])
        expected = row[right].max(), row.max(), row[~right].max()
        assert (found.right[q], found.best[q], found.wrong[q]) == expected


def test_a_query_that_describes_every_picture_is_left_out():
    text = np.asarray([[1, 0, 0]] * 4, np.float32)
    found = query_scores(EYE, text, np.asarray([0, 1, 2, 0]), ["图", "图", "图", "猫"])
    assert (found.left_out, len(found.right)) == (3, 1)
    with pytest.raises(DataError, match="every text describes every picture"):
        query_scores(EYE, text[:3], np.asarray([0, 1, 2]), ["图"] * 3)


def test_one_picture_is_not_enough():
    with pytest.raises(DataError, match="1 pictures, calibration needs at least two"):
        query_scores(EYE[:1], EYE[:1], np.asarray([0]), ["猫"])


# ── what is measured ────────────────────────────────────────────────────────────────────────────


def test_towers_that_tell_apart_reach_everything():
    kept, output = measure_calibration(
        scores_of([0.8, 0.9, 0.7] * 20, [0.1, 0.2, 0.3] * 20), pictures=60, draws=DRAWS
    )
    assert kept.threshold == pytest.approx(0.5)
    assert (kept.precision, kept.recall, kept.auroc, kept.n) == (1, 1, 1, 60)
    assert kept.precision_held_out == 1
    assert output.metrics["rejection"].value == 1
    assert output.metrics["no_match_auroc"].ci95 == (1, 1)


def test_collapsed_towers_give_chance_and_no_threshold():
    kept, output = measure_calibration(scores_of([0.5] * 20, [0.5] * 20), pictures=20, draws=DRAWS)
    assert kept.threshold is None
    assert (kept.precision, kept.recall, kept.auroc) == (0.5, 1, 0.5)
    assert kept.precision_held_out is None
    assert not output.details["reached"]
    assert np.isnan(output.metrics["threshold"].value)
    assert np.isnan(output.metrics["rejection"].value)


def test_intervals_hold_the_value_and_follow_the_seed():
    rng = np.random.default_rng(1)
    scores = scores_of(0.5 + 0.2 * rng.standard_normal(300), 0.3 + 0.2 * rng.standard_normal(300))
    first, again, other = (
        measure_calibration(scores, precision=0.8, pictures=300, seed=seed, draws=200)[1]
        for seed in (0, 0, 1)
    )
    for name in ("precision", "recall", "rejection", "no_match_auroc"):
        low, high = first.metrics[name].ci95 or (0, 0)
        assert low < first.metrics[name].value < high
        assert high - low < 0.2
    assert first.metrics == again.metrics != other.metrics


def test_the_bootstrap_of_the_auroc_equals_drawing_queries_again():
    """Weights stand for repeated queries: with each picture drawn once it is the AUROC itself."""
    rng = np.random.default_rng(2)
    scores = scores_of(rng.integers(0, 5, 40), rng.integers(0, 4, 40), cluster=np.arange(40) // 2)
    samples = measure_calibration(scores, precision=0.5, pictures=20, draws=2_000)[1]
    low, high = samples.metrics["no_match_auroc"].ci95 or (0, 0)
    drawn = []
    for _ in range(2_000):
        pictures = rng.integers(0, 20, 20)
        rows = np.concatenate([np.flatnonzero(scores.cluster == p) for p in pictures])
        drawn.append(auroc(scores.best[rows], scores.wrong[rows]))
    assert (low, high) == pytest.approx(np.percentile(drawn, (2.5, 97.5)), abs=0.02)


def test_held_out_precision_uses_the_other_half():
    """Chosen on all pictures the threshold is perfect; on halves of two pictures it need not be."""
    rng = np.random.default_rng(3)
    match, other = rng.standard_normal((2, 400))
    kept, _ = measure_calibration(scores_of(match, other), precision=0.6, pictures=400, draws=2)
    assert kept.precision >= 0.6
    assert kept.precision_held_out != kept.precision
    assert 0.3 < (kept.precision_held_out or 0) < 0.9


# ── with a model ────────────────────────────────────────────────────────────────────────────────


def test_a_shard_folder_is_calibrated_per_language(tiny_encoder, tiny_shards):
    pairs = embed_pairs(tiny_encoder, ShardReader(tiny_shards / "test"))
    found, outputs = calibrate(tiny_encoder, pairs, precision=0.5, data="scenes", draws=DRAWS)
    assert found.fingerprint == tiny_encoder.fingerprint
    assert set(found.languages) == set(outputs) == {"zh", "en"}
    assert found.languages["zh"].pictures == len(pairs.keys)
    assert found.languages["en"].n == len(pairs.texts["en"].texts)


def test_wrong_precision_and_no_captions_are_errors(tiny_encoder):
    texts = TextEmbeddings(EYE, np.arange(3), ["a", "b", "c"])
    pairs = PairEmbeddings(EYE, {"ja": texts}, ["a", "b", "c"], [{}] * 3, [])
    with pytest.raises(ConfigError, match="precision is 95"):
        calibrate(tiny_encoder, pairs, precision=95, data="x")
    with pytest.raises(DataError, match="no captions in zh or en"):
        calibrate(tiny_encoder, pairs, data="x")

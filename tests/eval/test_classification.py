"""Accuracies against brute force, ties, intervals, confusions, labels that do not fit.

Not for class names and prompts (test_class_names.py, ../test_zero_shot.py).
"""

import json
from math import comb

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from m2encoder.errors import DataError
from m2encoder.eval.classification import measure_classification, measure_scores
from m2encoder.zero_shot import accuracy_of_scores, class_scores


def names(num_classes):
    return [f"类{k}" for k in range(num_classes)]


def whole_scores(seed, num_pictures, num_classes, *, most):
    """Scores among few whole numbers, so that many tie, and targets."""
    rng = np.random.default_rng(seed)
    scores = rng.integers(0, most + 1, (num_pictures, num_classes)).astype(np.float32)
    return scores, rng.integers(num_classes, size=num_pictures)


def chance_of_hit(row, target, k):
    """The definition: how often the target is among the k best of a row whose ties are shuffled."""
    above = sum(score > row[target] for score in row)
    group = sum(score == row[target] for score in row)
    places = min(max(0, k - above), group)
    return 1 - comb(group - 1, places) / comb(group, places)


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    num_pictures=st.integers(1, 30),
    num_classes=st.integers(1, 9),
    most=st.sampled_from([0, 1, 4, 10**6]),
)
def test_accuracies_equal_brute_force(seed, num_pictures, num_classes, most):
    scores, targets = whole_scores(seed, num_pictures, num_classes, most=most)
    found = measure_scores(scores, targets, labels=names(num_classes), draws=5).metrics
    for k in (1, 5):
        hits = [chance_of_hit(row, t, k) for row, t in zip(scores.tolist(), targets, strict=True)]
        if k == 1:
            recalls = [np.mean(np.array(hits)[targets == t]) for t in np.unique(targets)]
            assert found["mean_per_class_recall"].value == pytest.approx(np.mean(recalls))
        if k == 5 and num_classes < 6:
            assert "top5" not in found
        else:
            assert found[f"top{k}"].value == pytest.approx(np.mean(hits))
    thin = accuracy_of_scores(scores, targets)
    assert thin["top1"] == pytest.approx(found["top1"].value)
    assert thin["mean_class_recall"] == pytest.approx(found["mean_per_class_recall"].value)
    for metric in found.values():
        if metric.tie_low is not None and metric.tie_high is not None:
            assert metric.tie_low <= metric.value <= metric.tie_high


def test_vectors_are_measured_as_their_scores_are(monkeypatch):
    monkeypatch.setattr("m2encoder.zero_shot.ROWS", 7)
    rng = np.random.default_rng(1)
    image, classifier = rng.standard_normal((50, 8)), rng.standard_normal((6, 8))
    targets = rng.integers(6, size=50)
    by_vectors = measure_classification(image, classifier, targets, labels=names(6))
    by_scores = measure_scores(class_scores(image, classifier), targets, labels=names(6))
    assert by_vectors.metrics == by_scores.metrics
    assert by_vectors.details == by_scores.details
    assert np.array_equal(by_vectors.ranks["class_above"], by_scores.ranks["class_above"])
    assert np.array_equal(by_vectors.ranks["class_target"], targets)


def test_a_collapsed_model_scores_chance_between_0_and_1():
    found = measure_classification(
        np.ones((60, 4)), np.ones((8, 4)), np.arange(60) % 8, labels=names(8)
    )
    for name, chance in (("top1", 1 / 8), ("top5", 5 / 8), ("mean_per_class_recall", 1 / 8)):
        metric = found.metrics[name]
        assert metric.value == pytest.approx(chance)
        assert (metric.tie_low, metric.tie_high) == (0.0, 1.0)
        assert metric.ci95 == pytest.approx((chance, chance))
    assert found.details["chance"] == 1 / 8
    assert found.details["tied_pictures"] == 60


def test_rare_classes_weigh_as_much_as_frequent_ones_in_the_mean_recall():
    scores = np.zeros((10, 3), np.float32)
    scores[:, 0] = 1  # everything is taken for class 0
    targets = np.array([0] * 8 + [1] * 2)  # class 2 never occurs
    found = measure_scores(scores, targets, labels=["猫", "狗", "🐦"])
    assert found.metrics["top1"].value == 0.8
    assert found.metrics["mean_per_class_recall"].value == 0.5
    assert found.metrics["mean_per_class_recall"].tie_low is None
    assert found.details["labels_never_seen"] == ["🐦"]


def test_classes_and_confusions_worked_by_hand():
    scores = np.array(
        [[9, 1, 0], [1, 9, 0], [1, 9, 0], [0, 1, 9], [0, 9, 1], [9, 9, 0]], np.float32
    )
    found = measure_scores(scores, np.array([0, 0, 0, 0, 1, 1]), labels=["猫", "dog", "ＢＩＲＤ"])
    details = found.details
    assert details["classes"] == [
        {"name": "猫", "n": 4, "top1": 0.25, "confused_with": "dog", "confused_n": 2},
        {"name": "dog", "n": 2, "top1": 0.75, "confused_with": "猫", "confused_n": 0.5},
        {"name": "ＢＩＲＤ", "n": 0, "top1": None},
    ]
    assert details["confusions"] == [
        {"true": "猫", "predicted": "dog", "n": 2},
        {"true": "猫", "predicted": "ＢＩＲＤ", "n": 1},
        {"true": "dog", "predicted": "猫", "n": 0.5},
    ]
    assert details["confusion"] == [[1, 2, 1], [0.5, 1.5, 0], [0, 0, 0]]
    assert details["tied_pictures"] == 1
    json.dumps(details, allow_nan=False)


def test_a_long_list_of_classes_has_no_whole_confusion():
    scores = np.eye(21, dtype=np.float32)
    details = measure_scores(scores, np.arange(21), labels=names(21)).details
    assert "confusion" not in details
    assert details["confusions"] == []


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), most=st.sampled_from([1, 5]))
def test_every_picture_is_taken_for_one_class_in_all(seed, most):
    scores, targets = whole_scores(seed, 40, 7, most=most)
    details = measure_scores(scores, targets, labels=names(7), draws=2).details
    sums = np.sum(details["confusion"], axis=1)
    assert sums == pytest.approx(np.bincount(targets, minlength=7), abs=0.01)
    assert [row["n"] for row in details["classes"]] == np.bincount(targets, minlength=7).tolist()


def test_intervals_lie_around_values_and_equal_those_of_pictures_drawn_one_by_one():
    scores, targets = whole_scores(3, 300, 6, most=10**6)
    scores[np.arange(300), targets] += 600_000
    found = measure_scores(scores, targets, labels=names(6), draws=400, seed=9).metrics
    rng, drawn = np.random.default_rng(0), []
    right = scores.argmax(axis=1) == targets
    for _ in range(4000):
        rows = rng.integers(300, size=300)
        recalls = [right[rows][targets[rows] == k].mean() for k in range(6)]
        drawn.append((right[rows].mean(), np.mean(recalls)))
    expected = np.percentile(drawn, (2.5, 97.5), axis=0)
    for column, name in enumerate(("top1", "mean_per_class_recall")):
        # 400 draws leave the ends of an interval unsure by a few thousandths.
        assert found[name].ci95 == pytest.approx(expected[:, column], abs=0.012)
        assert found[name].n == 300


def test_classes_that_a_draw_lacks_are_left_out_of_its_mean_recall():
    scores = np.eye(4, dtype=np.float32)
    found = measure_scores(scores, np.arange(4), labels=names(4)).metrics
    assert found["mean_per_class_recall"].ci95 == (1.0, 1.0)


def test_one_picture_has_no_interval():
    assert measure_scores([[0.0, 1.0]], [1], labels=names(2)).metrics["top1"].ci95 is None


def test_repeated_labels_are_counted_not_refused():
    """Published lists have some; their classes tie wherever their vectors do."""
    found = measure_scores(np.eye(3), np.arange(3), labels=["missile", "missile", "sunglasses"])
    assert found.details["repeated_labels"] == ["missile"]


@pytest.mark.parametrize(
    ("scores", "targets", "labels", "error", "message"),
    [
        ([[0.0, 1], [np.nan, 1]], [0, 1], "ab", DataError, "1 of 2 rows hold NaN .* row 1"),
        (np.zeros((0, 2)), np.zeros(0, int), "ab", DataError, "0 labelled pictures"),
        ([[0.0, 1]], [0], "abc", DataError, "3 labels for 2 classes, expected one each"),
        ([[0.0, 1]], [0], "a", DataError, "1 labels for 2 classes"),
        ([[0.0, 1]], [2], "ab", ValueError, "targets reach from 2 to 2, expected 0 to 1"),
        (
            [[0.0, 1]],
            [0, 1],
            "ab",
            ValueError,
            r"targets have shape \(2,\), expected .* 1 pictures",
        ),
    ],
)
def test_wrong_scores_and_labels_are_refused(scores, targets, labels, error, message):
    with pytest.raises(error, match=message):
        measure_scores(np.array(scores), np.array(targets), labels=list(labels))


@pytest.mark.parametrize(
    ("image", "classifier", "error", "message"),
    [
        (np.full((1, 2), np.nan), np.eye(2), DataError, "pictures: 1 of 1 .* NaN"),
        (np.eye(2)[:1], np.array([[0, 1], [np.inf, 0]]), DataError, "classes: 1 of 2"),
        (np.eye(3)[:1], np.eye(2), ValueError, r"\(1, 3\) and classes \(2, 2\)"),
        (np.zeros((0, 2)), np.eye(2), DataError, "no pictures"),
    ],
)
def test_wrong_vectors_are_refused(image, classifier, error, message):
    with pytest.raises(error, match=message):
        measure_classification(image, classifier, [0], labels=["a", "b"])

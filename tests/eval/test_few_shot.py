"""Few-shot accuracy: equal to its draws done by hand, honest about what a class lacks.

Logistic regression needs scikit-learn, an extra.
"""

import math
import sys

import numpy as np
import pytest
from made_features import clusters, needs_sklearn, some, unit

from m2encoder.errors import ConfigError, DataError
from m2encoder.eval.few_shot import measure_few_shot, nearest_mean_scores, student_half_width
from m2encoder.eval.probe import join


@pytest.fixture(scope="module")
def split():
    return join(clusters(100, seed=1), clusters(60, seed=2))


@pytest.fixture
def no_sklearn(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn", None)  # as Python marks what must not be found


def test_nearest_mean_worked_by_hand():
    train = np.array([[1, 0], [0, 1], [0, -1]], np.float32)
    scores = nearest_mean_scores(train, np.array([4, 4, 7]), np.array([[0.6, 0.8]], np.float32))
    assert scores[0] == pytest.approx([1.4 / math.sqrt(2), -0.8], abs=1e-6)


def test_few_shot_accuracy_equals_its_draws_done_by_hand(split):
    output = measure_few_shot(split, shots=[2], draws=3, seed=4)
    shares = []
    for draw in range(3):
        rng = np.random.default_rng([4, draw])
        rows = np.concatenate(
            [rng.permutation(np.flatnonzero(split.train.targets == k))[:2] for k in range(5)]
        )
        means = np.stack(
            [split.train.vectors[rows[2 * k : 2 * k + 2]].mean(axis=0) for k in range(5)]
        )
        said = (split.test.vectors @ unit(means).T).argmax(axis=1)
        shares.append(np.mean(said == split.test.targets))
    metric = output.metrics["nearest_mean_top1_at_2"]
    assert metric.value == pytest.approx(np.mean(shares))
    half = 4.303 * np.std(shares, ddof=1) / math.sqrt(3)
    assert metric.ci95 == pytest.approx((metric.value - half, metric.value + half))
    assert output.details["by_draw"]["nearest_mean_top1_at_2"] == pytest.approx(shares)


def test_more_shots_help(split):
    output = measure_few_shot(split, shots=[1, 16], draws=10)
    values = {name: metric.value for name, metric in output.metrics.items()}
    assert values["nearest_mean_top1_at_16"] > values["nearest_mean_top1_at_1"]


def test_shots_that_no_class_has_are_left_out_and_short_classes_named():
    train = clusters(100, seed=1)
    rows = np.flatnonzero((train.targets != 1) | (np.arange(100) < 12))  # three pictures of 狗
    output = measure_few_shot(join(some(train, rows), clusters(20)), shots=[2, 4, 64], draws=2)
    assert output.details["shots_left_out"] == [64]
    assert output.details["classes_with_fewer"] == {"2": [], "4": ["狗"]}


@pytest.mark.parametrize(("shots", "draws"), [([0], 2), ([], 2), ([1], 0)])
def test_wrong_shots_and_draws_are_refused(split, shots, draws):
    with pytest.raises(ConfigError, match="expected at least 1 of each"):
        measure_few_shot(split, shots=shots, draws=draws)


def test_too_many_shots_alone_are_refused(split):
    with pytest.raises(DataError, match="no class has more than 20 train pictures, 64 shots"):
        measure_few_shot(split, shots=[64])


def test_one_draw_has_no_interval(split):
    assert (
        measure_few_shot(split, shots=[1], draws=1).metrics["nearest_mean_top1_at_1"].ci95 is None
    )


@pytest.mark.parametrize(
    ("count", "t"), [(2, 12.706), (6, 2.571), (31, 2.042), (41, 2.021), (121, 1.980)]
)
def test_interval_uses_student_s_quantiles(count, t):
    """From printed tables; beyond the one in the code the expansion takes over."""
    values = np.arange(count) % 2.0
    expected = t * np.std(values, ddof=1) / math.sqrt(count)
    assert student_half_width(values) == pytest.approx(expected, rel=1e-3)


def test_few_shot_without_sklearn_says_what_is_left_out(split, no_sklearn):
    output = measure_few_shot(split, shots=[1], draws=2)
    assert list(output.metrics) == ["nearest_mean_top1_at_1"]
    assert output.details["logistic"] == "left out: needs scikit-learn"


@needs_sklearn
def test_few_shot_logistic_regression_learns(split):
    metrics = measure_few_shot(split, shots=[1, 16], draws=3).metrics
    assert metrics["logistic_top1_at_16"].value > metrics["logistic_top1_at_1"].value > 0.2

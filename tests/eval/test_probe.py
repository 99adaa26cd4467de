"""Linear probe and nearest neighbours: equal to references, told apart from luck.

The linear probe's tests need scikit-learn, an extra.
"""

import json
import math
import sys
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from made_features import LABELS, clusters, needs_sklearn, some, unit

from m2encoder.cli.probe import probe
from m2encoder.errors import ConfigError, DataError, MissingExtraError
from m2encoder.eval.few_shot import measure_few_shot
from m2encoder.eval.logistic import choose_strength, fit_logistic
from m2encoder.eval.probe import (
    Features,
    join,
    knn_votes,
    measure_knn,
    measure_linear_probe,
    stratified,
    with_unseen,
)
from m2encoder.shards import ShardReader


@pytest.fixture(scope="module")
def split():
    return join(clusters(100, seed=1), clusters(60, seed=2))


@pytest.fixture
def no_sklearn(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn", None)  # as Python marks what must not be found


# --- the two sides -------------------------------------------------------------------------------


def test_classes_are_matched_by_their_labels_not_by_their_numbers():
    train, test = clusters(50, seed=1), clusters(25, seed=2)
    turned = Features(test.vectors, (test.targets + 2) % 5, [LABELS[(k - 2) % 5] for k in range(5)])
    assert np.array_equal(join(train, turned).test.targets, join(train, test).test.targets)


def test_labels_missing_from_train_are_named_and_never_right(split):
    train = clusters(100, seed=1)
    few = join(some(train, train.targets != 3), clusters(60, seed=2))
    for output in (measure_knn(few, k=5), measure_few_shot(few, shots=[4], draws=2)):
        assert output.details["missing_from_train"] == ["🐟"]
        assert output.details["pictures_missing_from_train"] == 12
    output = measure_knn(few, k=5)
    assert output.metrics["top1"].n == 60
    assert next(c for c in output.details["classes"] if c["name"] == "🐟")["top1"] == 0


def test_labels_that_have_nothing_in_common_are_refused():
    test = clusters(20, labels=["cat", "dog"])
    with pytest.raises(
        DataError, match=r"no label of test is in train: train has '猫', '狗', .*'cat'"
    ):
        join(clusters(20), test)


def test_one_class_alone_is_refused():
    train = clusters(20)
    with pytest.raises(DataError, match="train shows one class, '猫', expected at least two"):
        join(some(train, train.targets == 0), clusters(20))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"vectors": np.zeros((0, 8), np.float32), "targets": np.zeros(0, int)}, DataError,
         "no labelled pictures"),
        ({"targets": np.zeros(3, int)}, ValueError, "targets have shape"),
        ({"targets": np.full(20, 5)}, ValueError, "reach from 5 to 5, expected 0 to 4"),
        ({"labels": ["猫", "狗", "猫", "x", "y"]}, DataError, "label '猫' appears twice"),
    ],
)  # fmt: skip
def test_features_that_do_not_fit_are_refused(change, error, message):
    with pytest.raises(error, match=message):
        replace(clusters(20), **change)


def test_nan_vectors_are_refused_naming_the_first():
    vectors = clusters(20).vectors.copy()
    vectors[7, 2] = np.nan
    with pytest.raises(DataError, match="1 of 20 vectors hold NaN or infinity, the first is row 7"):
        replace(clusters(20), vectors=vectors)


def test_vectors_of_two_models_are_refused():
    with pytest.raises(ValueError, match="train vectors have width 8, test vectors 4"):
        join(clusters(20), clusters(20, dim=4))


# --- nearest neighbours --------------------------------------------------------------------------


def votes_by_sorting(train, targets, test, *, num_classes, k, temperature):
    """All train pictures in order of their cosines; ties for the last places share them."""
    votes = np.zeros((len(test), num_classes))
    for row, query in enumerate(test.astype(np.float64)):
        cosines = (train.astype(np.float64) @ query).astype(np.float32)
        last = np.sort(cosines)[-k]
        for cosine, target in zip(cosines, targets, strict=True):
            if cosine >= last:
                places = (k - (cosines > last).sum()) / (cosines == last).sum()
                share = 1 if cosine > last else places
                votes[row, target] += share * np.exp(
                    (float(cosine) - float(cosines.max())) / temperature
                )
    return votes


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10**6), st.integers(2, 90), st.data())
def test_votes_equal_sorting_all_of_train(seed, count, data):
    rng = np.random.default_rng(seed)
    few_values = data.draw(st.booleans(), label="vectors repeat, so cosines tie")
    train = rng.integers(-1, 2, (count, 3)) + (1e-3 if few_values else rng.normal(size=(count, 3)))
    test = rng.normal(size=(7, 3))
    targets = rng.integers(0, 4, count)
    options = {"num_classes": 4, "k": data.draw(st.integers(1, count)), "temperature": 0.07}
    found = knn_votes(unit(train), targets, unit(test), **options)
    expected = votes_by_sorting(unit(train), targets, unit(test), **options)
    assert np.allclose(found, expected, rtol=1e-5, atol=1e-9)


def test_votes_worked_by_hand():
    """Cosines 1, 0.6, 0.6, 0: with k = 2 the two in the middle share the second place."""
    train = np.array([[1, 0], [0.6, 0.8], [0.6, -0.8], [0, 1]], np.float32)
    votes = knn_votes(train, np.array([0, 1, 2, 2]), np.array([[1, 0]]), num_classes=3, k=2,
                      temperature=0.5)  # fmt: skip
    second = 0.5 * math.exp((0.6 - 1) / 0.5)
    assert votes[0] == pytest.approx([1, second, second], rel=1e-6)


def test_more_ties_than_are_looked_at_are_all_found():
    """A thousand equal pictures: whichever the search happens to see, classes weigh by number."""
    train = np.repeat(np.array([[1, 0], [0, 1]], np.float32), [1000, 5], axis=0)
    targets = np.repeat([0, 1, 2], [250, 750, 5])
    votes = knn_votes(train, targets, np.array([[1, 0]]), num_classes=3, k=20)
    assert votes[0] == pytest.approx([5, 15, 0])


def test_order_of_train_pictures_does_not_matter(split):
    order = np.random.default_rng(5).permutation(len(split.train.targets))
    shuffled = replace(split, train=some(split.train, order))
    one, other = measure_knn(split, k=10), measure_knn(shuffled, k=10)
    assert one.metrics == other.metrics


def test_knn_finds_well_parted_classes_and_chance_in_noise():
    clear = join(clusters(100, noise=0.1, seed=1), clusters(50, noise=0.1, seed=2))
    assert measure_knn(clear, k=5).metrics["top1"].value == 1
    rng = np.random.default_rng(0)
    noise = [
        Features(unit(rng.normal(size=(400, 8))), np.arange(400) % 5, LABELS) for _ in range(2)
    ]
    top1 = measure_knn(join(*noise), k=20).metrics["top1"]
    assert top1.value == pytest.approx(0.2, abs=0.08)
    assert top1.ci95 is not None
    assert top1.ci95[0] < top1.value < top1.ci95[1]


def test_extreme_temperatures_stay_finite(split):
    cold = measure_knn(split, k=10, temperature=1e-6).metrics["top1"].value
    assert cold == measure_knn(split, k=1).metrics["top1"].value


@pytest.mark.parametrize("k", [0, 101])
def test_k_out_of_range_is_refused(split, k):
    with pytest.raises(ConfigError, match=f"k is {k}, expected 1 to 100, the number of train"):
        measure_knn(split, k=k)


def test_a_temperature_of_zero_is_refused(split):
    with pytest.raises(ConfigError, match="temperature is 0, expected more than 0"):
        measure_knn(split, temperature=0)


# --- linear probe --------------------------------------------------------------------------------


def test_missing_sklearn_names_the_extra(split, no_sklearn):
    with pytest.raises(MissingExtraError, match=r"scikit-learn .*pip install 'm2encoder\[probe\]'"):
        measure_linear_probe(split)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(0, 5), min_size=1, max_size=60), st.integers(0, 99))
def test_held_out_part_is_drawn_within_each_class(targets, seed):
    targets = np.asarray(targets)
    rest, held_out = stratified(targets, 0.2, seed=seed)
    assert sorted([*rest, *held_out]) == list(range(len(targets)))
    for k in np.unique(targets):
        size = int((targets == k).sum())
        expected = min(size - 1, max(1, round(0.2 * size)))
        assert (targets[held_out] == k).sum() == expected
    again = stratified(targets, 0.2, seed=seed)
    assert np.array_equal(held_out, again[1])


def test_unseen_classes_score_below_all_others():
    scores = with_unseen(np.array([[1.0, -5.0]]), np.array([2, 0]), 4)
    assert scores.tolist() == [[-5, -6, 1, -6]]


@needs_sklearn
def test_linear_probe_on_exactly_five_classes():
    """CLIP_benchmark reports NaN there; with five classes top-5 would say nothing."""
    split = join(clusters(200, noise=0.1, seed=1), clusters(50, noise=0.1, seed=2))
    output = measure_linear_probe(split)
    assert output.metrics["top1"].value == 1
    assert output.metrics["mean_per_class_recall"].value == 1
    assert all(math.isfinite(metric.value) for metric in output.metrics.values())


@needs_sklearn
@pytest.mark.parametrize("num_classes", [2, 6])
def test_logistic_regression_is_at_the_minimum_of_its_loss(num_classes):
    """The gradient of C * sum of cross entropies + |w|^2 / 2 vanishes; two classes by halves."""
    labels = [f"类{k}" for k in range(num_classes)]
    data = clusters(60, labels=labels, dim=4)
    model = fit_logistic(data.vectors, data.targets, 0.5)
    x = (data.vectors - model.mean) / model.scale
    logits = x @ model.weights.T + model.biases
    odds = np.exp(logits - logits.max(axis=1, keepdims=True))
    wrong = odds / odds.sum(axis=1, keepdims=True) - np.eye(num_classes)[data.targets]
    factor = 2 if num_classes == 2 else 1  # one vector of weights, written as two opposite halves
    gradient = 0.5 * wrong.T @ x + factor * model.weights
    assert np.abs(gradient).max() < 5e-3
    assert np.abs(wrong.sum(axis=0)).max() < 5e-3
    assert model.converged


@needs_sklearn
def test_constant_columns_do_no_harm():
    data = clusters(60)
    wide = np.concatenate([data.vectors, np.full((60, 2), 0.5, np.float32)], axis=1)
    model, plain = (
        fit_logistic(wide, data.targets, 1.0),
        fit_logistic(data.vectors, data.targets, 1.0),
    )
    assert np.allclose(model.scores(wide), plain.scores(data.vectors), atol=1e-2)


@needs_sklearn
def test_of_equally_good_strengths_the_smallest_is_taken():
    train, test = clusters(100, noise=0.05, seed=1), clusters(20, noise=0.05, seed=2)
    chosen, shares = choose_strength(
        train.vectors, train.targets, test.vectors, test.targets, (10.0, 0.1, 1.0)
    )
    assert set(shares.values()) == {1.0}
    assert chosen == 0.1


@needs_sklearn
def test_linear_probe_says_how_it_was_fitted(split):
    output = measure_linear_probe(split, seed=3)
    details = output.details
    assert details["held_out"] == 20
    assert details["converged"]
    assert set(details["strengths"]) == {"0.0001", "0.001", "0.01", "0.1", "1", "10", "100"}
    assert details["strengths"][f"{details['strength']:g}"] == max(details["strengths"].values())
    assert output.metrics == measure_linear_probe(split, seed=3).metrics
    assert json.loads(json.dumps(details)) == details


@needs_sklearn
def test_linear_probe_with_one_picture_for_each_class():
    """Nothing can be held out, so the middle strength is taken."""
    train = clusters(5, noise=0.01)
    details = measure_linear_probe(join(train, clusters(20, noise=0.01))).details
    assert (details["held_out"], details["strengths"], details["strength"]) == (0, {}, 0.1)


# --- the command ---------------------------------------------------------------------------------


@pytest.fixture
def command(tiny_model_folder, tiny_shards):
    def run(**options):
        paths = {"train": tiny_shards / "train", "test": tiny_shards / "val", "label": "object"}
        return probe(str(tiny_model_folder), **(paths | options))

    return run


@pytest.mark.parametrize("method", ["knn", "few-shot"])
def test_command_prints_and_writes_a_result(command, tmp_path, capsys, method):
    assert command(method=method, k=5, shots=[1, 2], out=tmp_path / "结果") == 0
    shown = capsys.readouterr().out
    (path,) = (tmp_path / "结果").glob("*.json")
    written = json.loads(path.read_text("utf-8"))
    assert written["task"] == f"probe-{method}"
    assert all(metric["n"] == written["data"]["images"] for metric in written["metrics"].values())
    assert ("top-1" if method == "knn" else "nearest mean top1@2") in shown


@needs_sklearn
def test_command_probes_linearly_and_reads_class_folders(
    tiny_model_folder, tiny_shards, tmp_path, capsys
):
    names = {"circle": "圆形", "square": "方形", "star": "星 ⭐"}
    for part in ("train", "val"):
        for pair in ShardReader(tiny_shards / part):
            if pair.meta.get("object") in names:
                path = tmp_path / part / names[pair.meta["object"]] / f"{pair.key}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(pair.image)
    model = str(tiny_model_folder)
    assert probe(model, train=tmp_path / "train", test=tmp_path / "val", json=True) == 0
    [shown] = json.loads(capsys.readouterr().out)
    assert {each["name"] for each in shown["details"]["classes"]} == set(names.values())
    assert shown["protocol"]["status"] == "custom"


def test_stored_vectors_give_the_same_result(command, tmp_path, capsys):
    results = []
    for _ in range(2):
        assert command(method="knn", json=True, store=tmp_path / "vectors") == 0
        [result] = json.loads(capsys.readouterr().out)
        results.append(result["metrics"])
    assert results[0] == results[1]
    assert any((tmp_path / "vectors").iterdir())


def test_shards_without_a_label_key_are_refused(command):
    with pytest.raises(ConfigError, match="say which key of its meta holds the label"):
        command(method="knn", label=None)

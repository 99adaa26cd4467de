"""Task files, classifiers and accuracy: by hand, and bad label lists.

Not for what a whole data set gives: see eval/test_suite.py.
"""

import json

import numpy as np
import pytest

from m2encoder.errors import DataError
from m2encoder.zero_shot import (
    ZeroShotClass,
    ZeroShotTask,
    accuracy_of_scores,
    build_classifier,
    class_scores,
    load_tasks,
    zero_shot_accuracy,
)


def animals():
    """A task of two classes, as a file holds it."""
    return {
        "name": "animal",
        "label": "animal",
        "classes": [
            {"label": "cat", "zh": ["猫", "貓"], "en": ["cat"]},
            {"label": "dog", "zh": ["狗"], "en": ["dog"]},
        ],
        "templates": {"zh": ["{}", "一张{}的照片。"], "en": ["a photo of a {}"]},
    }


def write_task(folder, task):
    path = folder / "zero_shot.json"
    path.write_text(json.dumps({"tasks": [task]}, ensure_ascii=False), encoding="utf-8")
    return path


def test_a_task_file_is_read_from_its_path_or_its_folder(tmp_path):
    path = write_task(tmp_path, animals())
    (task,) = load_tasks(path)
    assert load_tasks(tmp_path) == [task]
    assert task.labels == ["cat", "dog"]
    assert task.classes[0] == ZeroShotClass("cat", {"zh": ("猫", "貓"), "en": ("cat",)})


def test_every_name_is_put_into_every_template(tmp_path):
    (task,) = load_tasks(write_task(tmp_path, animals()))
    assert task.prompts("zh") == [
        ["猫", "一张猫的照片。", "貓", "一张貓的照片。"],
        ["狗", "一张狗的照片。"],
    ]


def test_braces_in_a_name_or_template_stay_as_they_are():
    classes = tuple(ZeroShotClass(label, {"en": (label,)}) for label in ("{0}", "{x}"))
    task = ZeroShotTask("odd", "odd", classes, {"en": ("a {} in {braces}",)})
    assert task.prompts("en") == [["a {0} in {braces}"], ["a {x} in {braces}"]]


def test_a_classifier_row_is_the_normalised_mean_of_unit_prompts(tiny_encoder, tmp_path):
    (task,) = load_tasks(write_task(tmp_path, animals()))
    mean = tiny_encoder.encode_text(["猫", "一张猫的照片。", "貓", "一张貓的照片。"]).mean(axis=0)
    classifier = build_classifier(tiny_encoder, task, "zh")
    assert classifier.shape == (2, tiny_encoder.dim)
    # Other batches are summed in another order: a few units in the last place.
    np.testing.assert_allclose(classifier[0], mean / np.linalg.norm(mean), rtol=0, atol=2e-6)
    assert classifier.dtype == np.float32


def test_pictures_that_are_the_class_vectors_are_all_classified_right(tiny_encoder, tmp_path):
    (task,) = load_tasks(write_task(tmp_path, animals()))
    classifier = build_classifier(tiny_encoder, task, "en")
    accuracy = zero_shot_accuracy(tiny_encoder, classifier, ["cat", "dog"], task, "en")
    assert accuracy["top1"] == 1.0
    assert zero_shot_accuracy(tiny_encoder, classifier, ["dog", "cat"], task, "en")["top1"] == 0.0


def test_accuracy_worked_by_hand():
    scores = np.array(
        [
            [0.9, 0.1, 0.2, 0.3, 0.4, 0.5],  # right
            [0.9, 0.8, 0.7, 0.6, 0.5, 0.4],  # last of six: not even in the first five
            [0.1, 0.9, 0.0, 0.0, 0.0, 0.0],  # second
            [0.1, 0.9, 0.0, 0.0, 0.0, 0.0],  # right
        ],
        np.float32,
    )
    accuracy = accuracy_of_scores(scores, np.array([0, 5, 0, 1]))
    assert (accuracy["top1"], accuracy["top5"]) == (0.5, 0.75)
    assert accuracy["mean_class_recall"] == pytest.approx((0.5 + 0 + 1) / 3)  # classes 0, 5, 1
    assert (accuracy["classes"], accuracy["n"]) == (6, 4)


def test_top5_is_left_out_where_it_means_nothing():
    assert "top5" not in accuracy_of_scores(np.eye(5, dtype=np.float32), np.arange(5))


def test_a_collapsed_model_is_right_as_often_as_chance():
    accuracy = accuracy_of_scores(np.full((8, 6), 0.7, np.float32), np.arange(8) % 6)
    assert accuracy["top1"] == accuracy["mean_class_recall"] == accuracy["chance"] == 1 / 6
    assert accuracy["top5"] == pytest.approx(5 / 6)


def test_classes_of_one_vector_tie_exactly():
    """ImageNet's English list names two classes "missile": a picture cannot tell them apart."""
    vectors = np.random.default_rng(0).standard_normal((500, 301)).astype(np.float32)
    classifier = vectors[:33].copy()
    classifier[[7, 20, 32]] = classifier[0]
    scores = class_scores(vectors, classifier)
    assert np.array_equal(scores[:, [7, 20, 32]], scores[:, [0, 0, 0]])
    expected = (vectors.astype(np.float64) @ classifier.T.astype(np.float64)).astype(np.float32)
    np.testing.assert_allclose(scores, expected, rtol=1e-6)
    accuracy = accuracy_of_scores(class_scores(classifier, classifier), np.arange(33))
    assert accuracy["top1"] == pytest.approx((29 + 4 / 4) / 33)


def change(**fields):
    return animals() | fields


def with_classes(*classes):
    return change(classes=[{"label": label, "zh": zh, "en": en} for label, zh, en in classes])


@pytest.mark.parametrize(
    ("task", "message"),
    [
        (with_classes(("cat", ["猫"], ["a"]), ("cat", ["狗"], ["b"])), "label 'cat' appears twice"),
        (with_classes(("cat", ["猫"], ["a"]), ("dog", ["猫"], ["b"])), "zh name '猫' belongs to"),
        (with_classes(("cat", ["猫"], ["a"]), ("dog", [], ["b"])), "class 'dog' has no zh name"),
        (with_classes(("cat", ["猫"], ["a"])), "1 classes, expected at least two"),
        (with_classes(("cat", "猫", ["a"]), ("dog", ["狗"], ["b"])), "'猫' is not a list"),
        (change(templates={"zh": ["一张照片"]}), "template '一张照片', expected one {} in it"),
        (change(templates={"zh": []}), "no zh templates"),
        (change(templates={}), "no templates"),
        ({"name": "animal"}, "KeyError: 'classes'"),
    ],
)
def test_a_wrong_task_is_refused(tmp_path, task, message):
    with pytest.raises(DataError, match=message):
        load_tasks(write_task(tmp_path, task))


@pytest.mark.parametrize("content", ["", "{", "[]", '{"tasks": []}', '{"tasks": [3]}'])
def test_a_damaged_task_file_is_named(tmp_path, content):
    path = tmp_path / "zero_shot.json"
    path.write_text(content, encoding="utf-8")
    with pytest.raises(DataError, match=r"zero_shot\.json"):
        load_tasks(path)


def test_a_missing_task_file_is_named(tmp_path):
    with pytest.raises(DataError, match="no such file"):
        load_tasks(tmp_path)


def test_a_label_that_is_no_class_is_refused(tiny_encoder, tmp_path):
    (task,) = load_tasks(write_task(tmp_path, animals()))
    vectors = np.zeros((2, tiny_encoder.dim), np.float32)
    with pytest.raises(DataError, match="label 'horse' in the data is none of its 2 classes"):
        zero_shot_accuracy(tiny_encoder, vectors, ["cat", "horse"], task, "en")


def test_labels_must_be_as_many_as_pictures(tiny_encoder, tmp_path):
    (task,) = load_tasks(write_task(tmp_path, animals()))
    vectors = np.zeros((2, tiny_encoder.dim), np.float32)
    with pytest.raises(ValueError, match="1 labels for 2 pictures"):
        zero_shot_accuracy(tiny_encoder, vectors, ["cat"], task, "en")


def test_a_language_without_templates_is_refused(tmp_path):
    (task,) = load_tasks(write_task(tmp_path, animals()))
    with pytest.raises(DataError, match="no fr templates"):
        task.prompts("fr")


def test_nan_scores_are_refused():
    with pytest.raises(DataError, match="NaN"):
        accuracy_of_scores(np.array([[np.nan, 0.0]], np.float32), np.array([0]))

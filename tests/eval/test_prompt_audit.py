"""Class names whose prompts disagree: by hand, by loops, with a real model.

Not for the command: test_bilingual_cli.py.
"""

import numpy as np
import pytest

from m2encoder.embed import embed_pairs
from m2encoder.errors import DataError
from m2encoder.eval.prompt_audit import audit_prompts, compare_accuracy, measure_prompts
from m2encoder.eval.result_facts import labelled_pictures
from m2encoder.shards import ShardReader
from m2encoder.zero_shot import ZeroShotClass, ZeroShotTask, load_tasks

DRAWS = 50
LABELS = ["crane", "导弹", "😀"]


def unit(rng, *shape):
    vectors = rng.standard_normal(shape).astype(np.float32)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def test_worked_by_hand():
    """The first class means the bird in Chinese and the machine, near the second, in English."""
    zh = np.asarray([[1, 0, 0], [0, 1, 0], [0, 0, 1]], np.float32)
    en = np.asarray([[0, 1, 0], [0, 0.8, 0.6], [0, 0, 1]], np.float32)
    output = audit_prompts(zh, en, LABELS, draws=DRAWS)
    assert output.metrics["cosine"].value == pytest.approx((0 + 0.8 + 1) / 3)
    assert output.metrics["zh_to_en_r1"].value == pytest.approx((1 / 3 + 0 + 1) / 3)  # 0, 0, 0
    assert output.metrics["en_to_zh_r1"].value == pytest.approx(2 / 3)
    worst, second, best = output.details["classes"]
    assert [row["label"] for row in (worst, second, best)] == ["crane", "导弹", "😀"]
    assert worst["margin"] == -1
    assert worst["en_nearest"] == {"label": "导弹", "cosine": 1.0}
    assert second["margin"] == pytest.approx(-0.2)
    assert second["zh_nearest"] == {"label": "crane", "cosine": 1.0}
    assert best["margin"] == pytest.approx(0.4)


def test_margins_and_neighbours_equal_loops():
    rng = np.random.default_rng(0)
    zh, en = unit(rng, 40, 5), unit(rng, 40, 5)
    labels = [str(k) for k in range(40)]
    sim = zh @ en.T
    for row in audit_prompts(zh, en, labels, draws=2).details["classes"]:
        k = int(row["label"])
        others = np.arange(40) != k
        assert row["cosine"] == pytest.approx(sim[k, k], abs=1e-6)
        rivals = sim[k, others].max(), sim[others, k].max()
        assert row["margin"] == pytest.approx(sim[k, k] - max(rivals), abs=1e-6)
        nearest = int(row["zh_nearest"]["label"]), int(row["en_nearest"]["label"])
        assert (sim[k, nearest[0]], sim[nearest[1], k]) == pytest.approx(rivals)


def test_the_most_doubtful_classes_come_first():
    rng = np.random.default_rng(1)
    rows = audit_prompts(unit(rng, 30, 4), unit(rng, 30, 4), [*map(str, range(30))], draws=2)
    margins = [row["margin"] for row in rows.details["classes"]]
    assert margins == sorted(margins)


def test_equal_rows_agree_and_collapsed_ones_score_chance():
    rows = unit(np.random.default_rng(2), 8, 5)
    labels = [*map(str, range(8))]
    same = audit_prompts(rows, rows, labels, draws=DRAWS).metrics
    assert same["cosine"].value == pytest.approx(1)
    assert same["zh_to_en_r1"].value == same["en_to_zh_r1"].value == 1
    flat = np.tile(rows[:1], (8, 1))
    chance = audit_prompts(flat, flat, labels, draws=DRAWS).metrics["zh_to_en_r1"]
    assert (chance.value, chance.tie_low, chance.tie_high) == (1 / 8, 0, 1)


def test_other_shapes_and_nan_are_refused():
    eye = np.eye(3, dtype=np.float32)
    with pytest.raises(ValueError, match="expected one row each for 3 labels"):
        audit_prompts(eye, eye[:2], LABELS)
    with pytest.raises(ValueError, match="two or more"):
        audit_prompts(eye[:1], eye[:1], ["one"])
    with pytest.raises(DataError, match="NaN"):
        audit_prompts(eye * np.nan, eye, LABELS)


def test_accuracy_is_compared_class_by_class():
    """Chinese is right on both pictures of the first class and none of the second."""
    eye = np.eye(3, dtype=np.float32)
    image, targets = eye[[0, 0, 2, 0]], np.asarray([0, 0, 1, 1])
    output = compare_accuracy(image, targets, eye, eye[[1, 2, 0]], LABELS, draws=DRAWS)
    assert output.metrics["accuracy_zh"].value == 0.5
    assert output.metrics["accuracy_en"].value == 0.25
    assert output.metrics["accuracy_gap"].value == 0.25
    assert output.details["accuracy_by_class"] == [
        {"label": "crane", "n": 2, "accuracy_zh": 1, "accuracy_en": 0, "accuracy_gap": 1},
        {"label": "导弹", "n": 2, "accuracy_zh": 0, "accuracy_en": 0.5, "accuracy_gap": -0.5},
    ]


def test_swapping_the_languages_flips_the_gap():
    rng = np.random.default_rng(3)
    image, targets = unit(rng, 50, 4), rng.integers(0, 3, 50)
    zh, en = unit(rng, 3, 4), unit(rng, 3, 4)
    there = compare_accuracy(image, targets, zh, en, LABELS, draws=DRAWS).metrics["accuracy_gap"]
    back = compare_accuracy(image, targets, en, zh, LABELS, draws=DRAWS).metrics["accuracy_gap"]
    assert back.value == pytest.approx(-there.value)
    assert there.ci95 is not None
    assert back.ci95 == pytest.approx((-there.ci95[1], -there.ci95[0]))


def test_a_task_is_audited_with_and_without_pictures(tiny_encoder, tiny_shards):
    pairs = embed_pairs(tiny_encoder, ShardReader(tiny_shards / "test"), languages=())
    task = next(task for task in load_tasks(tiny_shards / "test") if task.name == "object")
    rows, targets = labelled_pictures(pairs, task)
    alone = measure_prompts(tiny_encoder, task, draws=DRAWS)
    both = measure_prompts(tiny_encoder, task, pairs.image[rows], targets, draws=DRAWS)
    assert "accuracy_gap" not in alone.metrics
    assert both.metrics["accuracy_gap"].n == len(rows)
    assert both.details["classes"] == alone.details["classes"]
    assert {row["label"] for row in alone.details["classes"]} == set(task.labels)
    fish = next(row for row in alone.details["classes"] if row["label"] == "fish")
    assert fish["names"] == {"zh": ["鱼"], "en": ["a fish", "fish"]}


def test_names_that_read_the_same_agree(tiny_encoder):
    task = ZeroShotTask(
        "sign",
        "sign",
        tuple(ZeroShotClass(n, {"zh": (n,), "en": (n,)}) for n in ("👍", "２", "貓")),
        {"zh": ("{}",), "en": ("{}",)},
    )
    output = measure_prompts(tiny_encoder, task, draws=DRAWS)
    assert output.metrics["cosine"].value == pytest.approx(1, abs=1e-6)


def test_a_task_in_one_language_is_refused(tiny_encoder):
    names = {"zh": ("猫",)}
    classes = (ZeroShotClass("a", names), ZeroShotClass("b", {"zh": ("狗",)}))
    task = ZeroShotTask("animal", "animal", classes, {"zh": ("{}",)})
    with pytest.raises(DataError, match="no en templates"):
        measure_prompts(tiny_encoder, task)
